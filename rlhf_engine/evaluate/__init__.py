"""Quality of a policy: win rate against a baseline under a judge, perplexity, and best-of-N."""

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
