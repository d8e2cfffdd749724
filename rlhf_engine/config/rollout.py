"""Settings of sampling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf_engine.config.schema import Count, Positive, PositiveShare, Section, Share, WholeNumber


@dataclass(frozen=True)
class RolloutConfig(Section):
    """How responses are sampled."""

    max_prompt_tokens: Count = 512
    """Longest prompt, its frame included; data.long_prompts says what happens to a longer one."""
    max_response_tokens: Count = 256
    """Token budget of a response, EOS included."""
    temperature: Positive = 1.0
    """Divides the logits, in sampling and in the loss alike."""
    top_k: Count | None = None
    """Sample among the k likeliest tokens; None keeps all."""
    top_p: PositiveShare | None = None
    """Sample among the likeliest tokens that hold this probability mass; None keeps all."""
    min_p: Share | None = None
    """Sample among tokens at least this share as likely as the likeliest; None keeps all."""
    stop_token: str | None = None
    """Text of a token that ends an answer as EOS does; OpenAI's of 2019 is a period. None: EOS alone, which SFT teaches."""
    stop_after: WholeNumber = 0
    """First tokens of an answer, this many, in which `stop_token` ends nothing yet; OpenAI's is 16."""
    repetition_penalty: Positive = 1.0
    """Divides the positive logits of tokens that the prompt or the response has already, and multiplies the others (CTRL);
    1 changes nothing. Like the three before it, it says what is sampled from, not whose log-probs PPO learns from."""
    stop: tuple[str, ...] = ()
    """A response that contains one of these texts ends there; they are left out of its text."""
    batch_size: Count = 64
    """Most sequences that are decoded together."""
    cache: Literal["auto", "slots", "paged"] = "auto"
    """Where keys and values lie while sampling: in a slot for the longest sequence each, or in pages that a sequence claims as
    it grows and that samples of one prompt share; auto: slots on the CPU, pages on a GPU."""
    compile: bool | None = None
    """Whether torch compiles the layers for decode steps, in seconds for each power of two of sequences; None: on a GPU, where
    a step has a third of the kernels then, unless products round weights on the way (compute_dtype) or transformers does not
    mark the model's layers. On a CPU it was slower, and made a row's bits depend on its batch."""
    prefill_tokens: Count = 4096
    """Most prompt tokens that one forward pass reads, padding included; a longer prompt goes alone."""
    check_sequences: WholeNumber = 4
    """Sequences of each PPO rollout whose log-probs are compared with a fresh forward pass (`logprob_deviation`); 0: none.
    With ppo.old_logprobs "rescored" all of them are, at no cost."""

    def check(self) -> None:
        """An option that nothing would read is refused."""
        if self.stop_after and self.stop_token is None:
            raise ValueError(f"stop_after: got {self.stop_after}, expected 0; only stop_token reads it")
        if self.stop_after >= self.max_response_tokens:
            raise ValueError(
                f"stop_after: got {self.stop_after}, expected fewer than max_response_tokens {self.max_response_tokens}"
            )
