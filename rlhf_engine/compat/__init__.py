"""Trainers with the interface of other libraries, on this engine."""
