"""How far a score can be trusted: real retraining, agreement with it, and the predicted error."""
