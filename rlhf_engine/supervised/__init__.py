"""Supervised training: fine-tuning on demonstrations, and a reward model on rankings."""
