"""What the next steps train on: targets, look-ahead scores, policies and their decisions."""
