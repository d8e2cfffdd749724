"""Records of the three data sets, their files, their tokens and their batches."""

from rlhf_engine.data.batching import (
    Example,
    LanguageBatch,
    RankedBatch,
    length_batches,
    lengths_of,
    pad_sequences,
    rank_batch,
)
from rlhf_engine.data.loading import read_comparisons, read_demonstrations, read_prompts, read_texts
from rlhf_engine.data.pretraining import token_rows
from rlhf_engine.data.prompt_texts import PlainPrompt, PromptTexts
from rlhf_engine.data.records import Comparison, Demonstration, Message, PretrainingText, PromptRecord, parse_ranking
from rlhf_engine.data.stored import EXAMPLES, RecordCodec, Selection, Stored, stored
from rlhf_engine.data.tokenize import Codec, train_tokenizer

__all__ = [
    "EXAMPLES",
    "Codec",
    "Comparison",
    "Demonstration",
    "Example",
    "LanguageBatch",
    "Message",
    "PlainPrompt",
    "PretrainingText",
    "PromptRecord",
    "PromptTexts",
    "RankedBatch",
    "RecordCodec",
    "Selection",
    "Stored",
    "length_batches",
    "lengths_of",
    "pad_sequences",
    "parse_ranking",
    "rank_batch",
    "read_comparisons",
    "read_demonstrations",
    "read_prompts",
    "read_texts",
    "stored",
    "token_rows",
    "train_tokenizer",
]
