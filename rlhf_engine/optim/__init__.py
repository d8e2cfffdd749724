"""Optimizers, their state in host memory or 8 bits, learning rates, and averages of the weights."""
