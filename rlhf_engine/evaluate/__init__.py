"""How good a policy is: win rate against another under a judge, perplexity, and the best of several answers."""

from rlhf_engine.evaluate.human import Pair, read_preferences, write_pairs
from rlhf_engine.evaluate.judges import FunctionJudge, Judge, RewardJudge, load_judge, rank
from rlhf_engine.evaluate.perplexity import perplexity, read_documents
from rlhf_engine.evaluate.win_rate import WinRate, best_of_n, preference_rate, win_rate

__all__ = [
    "FunctionJudge",
    "Judge",
    "Pair",
    "RewardJudge",
    "WinRate",
    "best_of_n",
    "load_judge",
    "perplexity",
    "preference_rate",
    "rank",
    "read_documents",
    "read_preferences",
    "win_rate",
    "write_pairs",
]
