"""A recorded run that is run again, with exact curvature at every step."""
