"""Settings of sampling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf_engine.config.schema import Count, Positive, PositiveShare, Section, Share, WholeNumber


@dataclass(frozen=True)
class RolloutConfig(Section):
    """Sampling of responses."""

    max_prompt_tokens: Count = 512
    """Maximum length of a prompt in tokens, with the template; data.long_prompts sets the handling of a longer one."""
    max_response_tokens: Count = 256
    """Maximum length of a response in tokens, with EOS."""
    temperature: Positive = 1.0
    """Divisor of the logits, both in sampling and in the loss."""
    top_k: Count | None = None
    """Sample among the k most likely tokens. If None, among all."""
    top_p: PositiveShare | None = None
    """Sample among the most likely tokens that together have this probability. If None, among all."""
    min_p: Share | None = None
    """Sample among the tokens whose probability is at least this fraction of the highest one. If None, among all."""
    eos_tokens: tuple[str, ...] | None = None
    """Tokens that end a response, in addition to the tokenizer's EOS. If None, those are the EOS ids of the model's
    config.json and generation_config.json, and the token that ends a turn in the tokenizer's chat template."""
    stop_token: str | None = None
    """Text of a further token that ends a response; a period in OpenAI's code of 2019. Its reason is reported as
    `stop_token`, and the text of the response contains it. If None, there is none."""
    stop_after: WholeNumber = 0
    """Number of tokens at the start of a response in which `stop_token` does not end it. OpenAI's value is 16."""
    repetition_penalty: Positive = 1.0
    """Penalty on tokens that the prompt or the response already contains (CTRL): their positive logits are divided by
    it, their negative logits multiplied. 1 turns it off. Like top_k, top_p and min_p, it changes the sampling
    distribution only; PPO uses the log-probs of the unmodified policy."""
    stop: tuple[str, ...] = ()
    """Texts that end a response; the text of the response is cut before them. The text of a special token means the
    token, not the same characters."""
    batch_size: Count = 64
    """Maximum number of sequences that are decoded together."""
    cache: Literal["auto", "slots", "paged"] = "auto"
    """Layout of the key-value cache: slots reserves space for a sequence of maximum length; paged allocates pages as a
    sequence grows, and samples of one prompt share its pages. auto is slots on a CPU. On a GPU it is paged
    for models whose attention reads pages; for others, such as those with latent attention, paged works but copies the
    pages of a sequence in every step. Models with recurrent states are sampled with slots on both."""
    compile: bool | None = None
    """Compile the layers with torch for decode steps, which takes seconds for each batch size (powers of two) and
    reduces the kernels of a step to a third. It needs a GPU and the paged cache, and excludes compute_dtype bfloat16.
    If None, layers are compiled where that is possible and transformers marks the layers of the model. On a CPU,
    compiled layers were slower, and a row's bits depended on its batch."""
    merge_adapters: Literal["auto", "always", "never"] = "auto"
    """Add the adapter of the policy to a copy of the weights before each rollout, so that a step of sampling costs as
    much as without adapters. The copy uses memory of the phase generate. In half precision its rounding makes sampling
    differ from what is trained (metric logprob_deviation). auto does it in `rlhf ppo` if all products are in float32
    and the memory plan shows that the copy fits without fewer sequences, at the same peak or within memory.budget.
    Models without adapters are sampled as they are by `rlhf generate` and `rlhf eval`."""
    exact: bool = False
    """Compute scores and gradients with the layers of the sampler, so that the log-probs of a fresh policy have the
    bits of the sampled ones: logprob_deviation is 0, and the ratio is exactly 1 before the first step. For dense models
    with attention `sdpa` on a CPU; docs/design/numerics.md has the cost."""
    prefill_tokens: Count = 4096
    """Maximum prompt tokens per forward pass, padding included; a longer prompt is processed in a separate pass."""
    check_sequences: WholeNumber = 4
    """Sequences per PPO rollout whose sampled log-probs are compared with those of a forward pass (metric
    `logprob_deviation`); 0 turns the check off. With ppo.old_logprobs rescored, all sequences are compared at no extra
    cost."""

    def check(self) -> None:
        """Raise ValueError if `stop_after` is set without `stop_token` or covers the whole response."""
        if self.stop_after and self.stop_token is None:
            raise ValueError(f"stop_after: got {self.stop_after}, expected 0; only stop_token reads it")
        if self.stop_after >= self.max_response_tokens:
            raise ValueError(
                f"stop_after: got {self.stop_after}, expected fewer than max_response_tokens {self.max_response_tokens}"
            )
