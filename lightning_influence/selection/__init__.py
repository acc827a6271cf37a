"""What the next steps train on: the target, look-ahead scores, policies and their decisions."""
