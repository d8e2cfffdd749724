"""Scores of responses: reward functions, scaling and penalties, and calls of user code."""
