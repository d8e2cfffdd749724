"""Training on demonstrations and on rankings."""
