"""Proximal policy optimization and the policy gradients under it."""
