"""Proximal policy optimization, and the other policy-gradient objectives of the same training loop."""
