"""Scores of responses: reward functions, scaling and penalties, and the calls into user code."""
