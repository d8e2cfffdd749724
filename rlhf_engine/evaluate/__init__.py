"""How good a policy is: win rate against another, perplexity, and the best of several answers."""

from rlhf_engine.evaluate.perplexity import perplexity
from rlhf_engine.evaluate.win_rate import WinRate, best_of_n, win_rate

__all__ = ["WinRate", "best_of_n", "perplexity", "win_rate"]
