"""Records of demonstrations, rankings, prompts and pretraining text: their files, tokens and batches."""

from typing import TYPE_CHECKING

from rlhf_engine._lazy import exports

if TYPE_CHECKING:
    from rlhf_engine.data.batching import Example as Example
    from rlhf_engine.data.batching import LanguageBatch as LanguageBatch
    from rlhf_engine.data.batching import RankedBatch as RankedBatch
    from rlhf_engine.data.batching import length_batches as length_batches
    from rlhf_engine.data.batching import lengths_of as lengths_of
    from rlhf_engine.data.batching import pad_sequences as pad_sequences
    from rlhf_engine.data.batching import rank_batch as rank_batch
    from rlhf_engine.data.loading import read_comparisons as read_comparisons
    from rlhf_engine.data.loading import read_demonstrations as read_demonstrations
    from rlhf_engine.data.loading import read_prompts as read_prompts
    from rlhf_engine.data.loading import read_texts as read_texts
    from rlhf_engine.data.pretraining import token_rows as token_rows
    from rlhf_engine.data.prompt_texts import PlainPrompt as PlainPrompt
    from rlhf_engine.data.prompt_texts import PromptTexts as PromptTexts
    from rlhf_engine.data.records import Comparison as Comparison
    from rlhf_engine.data.records import Demonstration as Demonstration
    from rlhf_engine.data.records import Message as Message
    from rlhf_engine.data.records import PretrainingText as PretrainingText
    from rlhf_engine.data.records import PromptRecord as PromptRecord
    from rlhf_engine.data.records import parse_ranking as parse_ranking
    from rlhf_engine.data.store import EXAMPLES as EXAMPLES
    from rlhf_engine.data.store import RecordCodec as RecordCodec
    from rlhf_engine.data.store import Selection as Selection
    from rlhf_engine.data.store import Stored as Stored
    from rlhf_engine.data.store import stored as stored
    from rlhf_engine.data.tokenize import Codec as Codec
    from rlhf_engine.data.tokenize import train_tokenizer as train_tokenizer

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "Example": "batching",
        "LanguageBatch": "batching",
        "RankedBatch": "batching",
        "length_batches": "batching",
        "lengths_of": "batching",
        "pad_sequences": "batching",
        "rank_batch": "batching",
        "read_comparisons": "loading",
        "read_demonstrations": "loading",
        "read_prompts": "loading",
        "read_texts": "loading",
        "token_rows": "pretraining",
        "PlainPrompt": "prompt_texts",
        "PromptTexts": "prompt_texts",
        "Comparison": "records",
        "Demonstration": "records",
        "Message": "records",
        "PretrainingText": "records",
        "PromptRecord": "records",
        "parse_ranking": "records",
        "EXAMPLES": "store",
        "RecordCodec": "store",
        "Selection": "store",
        "Stored": "store",
        "stored": "store",
        "Codec": "tokenize",
        "train_tokenizer": "tokenize",
    },
)
