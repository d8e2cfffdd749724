"""Settings of the reward."""

from __future__ import annotations

from dataclasses import dataclass, field

from rlhf_engine.config.optim import OptimConfig
from rlhf_engine.config.schema import Count, NonNegative, Section, WholeNumber


@dataclass(frozen=True)
class RewardConfig(Section):
    """The reward of PPO, and the training of a reward model on rankings."""

    path: str | None = None
    """Folder of the trained reward model that scores the responses in PPO; it may be smaller than the policy."""
    function: str | None = None
    """Python function that scores the responses instead of a reward model, as module:function or file.py:function. It
    receives a list of prompts and a list of responses, and returns a list of floats; it may be async. Responses and
    prompts are strings, but a conversation is a list of messages, each a dictionary with role and content. Further
    parameters, such as `answer`, receive the columns of data.prompts with their names, and `**columns` all of them."""
    url: str | None = None
    """URL of a server that scores the responses instead of a reward model. It receives POST requests with JSON,
    {"prompts": [...], "responses": [...], "columns": {name: [...]}}, and answers {"scores": [...]}, one number per
    response. Section http has the limits of the requests."""
    batched: bool = True
    """Call the function once per rollout with lists. If false, it is called once per response, with single values, and
    returns a float."""
    concurrency: Count = 32
    """Maximum number of calls of an async function at once, if batched is false."""
    timeout: NonNegative = 0.0
    """Maximum seconds of one call of the function; 0 is no limit. A call that takes longer is ended and counts as failed.
    An async function is cancelled. A plain function is ended by an alarm, which exists in the main thread only: in
    a different thread, a limit for it is an error. Native code that ignores signals cannot be ended."""
    retries: WholeNumber = 0
    """Maximum number of times that a call is repeated after it has raised or exceeded the limit, 1, 2, 4, ... and at most
    60 seconds later. Every call receives the same samples; only the last failure ends the run. The numbers of a run do
    not depend on it if the function keeps no state between calls."""
    epochs: Count = 1
    """Passes over the rankings; more than one over-fits (InstructGPT, appendix C.2)."""
    batch_size: Count = 8
    """Prompts per optimizer step, each with all its completions and pairs."""
    microbatch: WholeNumber = 0
    """Prompts per forward and backward pass; 0 processes the whole batch in one pass."""
    evaluate_every: WholeNumber = 0
    """Optimizer steps between validations; 0 validates only at the end."""
    checkpoint_every: WholeNumber | None = None
    """Optimizer steps between checkpoints in OUTPUT_DIR/rm.checkpoint; 0 writes one only if the run ends early. If
    None, the interval is ten minutes, or twenty times the duration of the last checkpoint if that is longer."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer of the reward model."""

    def check(self) -> None:
        """Raise ValueError if two of a model, a function and a server are set."""
        given = [
            f"{name} is {value!r}" for name in ("function", "url", "path") if (value := getattr(self, name)) is not None
        ]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)}; set only one of the {'two' if len(given) == 2 else 'three'}")
        if not self.batched and self.function is None:
            raise ValueError("batched: got False, expected True; only function reads it")
        if self.concurrency != 32 and self.batched:
            raise ValueError(f"concurrency: got {self.concurrency}, expected 32; only batched false reads it")
        for name in ("timeout", "retries"):
            if getattr(self, name) and self.function is None:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected 0; only function reads it")

    @property
    def by_text(self) -> bool:
        """Whether a function or a server scores the texts, so that there is no reward model."""
        return self.function is not None or self.url is not None
