"""Training a language model from demonstrations to PPO on one shared backbone."""
