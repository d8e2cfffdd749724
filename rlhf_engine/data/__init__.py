"""Records of the three data sets, their files, their tokens and their batches."""

from rlhf_engine.data.batching import Example, LanguageBatch, RankedBatch, length_batches, pad_sequences, rank_batch
from rlhf_engine.data.loading import read_comparisons, read_demonstrations, read_prompts
from rlhf_engine.data.records import Comparison, Demonstration, PromptRecord, parse_ranking
from rlhf_engine.data.tokenize import Codec, train_tokenizer

__all__ = [
    "Codec",
    "Comparison",
    "Demonstration",
    "Example",
    "LanguageBatch",
    "PromptRecord",
    "RankedBatch",
    "length_batches",
    "pad_sequences",
    "parse_ranking",
    "rank_batch",
    "read_comparisons",
    "read_demonstrations",
    "read_prompts",
    "train_tokenizer",
]
