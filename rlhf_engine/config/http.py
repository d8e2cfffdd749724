"""Settings of the servers of rewards and judges."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_engine.config.schema import Count, NonNegative, Positive, Section, WholeNumber


@dataclass(frozen=True)
class HttpConfig(Section):
    """Requests to the servers of reward.url, and of the judges `openai:URL#MODEL` of eval.judge and iterate.judge."""

    timeout: Positive = 60.0
    """Maximum seconds of one request, from the connection to the end of the answer."""
    retries: WholeNumber = 3
    """Maximum number of times that a request is repeated after it failed: no connection, no answer in time, status 408,
    425, 429 or 5xx, or an answer that cannot be read."""
    wait: Positive = 1.0
    """Seconds before the first repeated request; each wait is twice the one before, and at most 60. A longer Retry-After
    of the server is followed."""
    concurrency: Count = 8
    """Maximum number of requests at once."""
    requests_per_second: NonNegative = 0.0
    """Maximum number of requests per second; 0 is no limit."""
    batch: Count = 32
    """Responses per request to reward.url."""
    cache: bool = True
    """Keep the answers in OUTPUT_DIR/http_cache.sqlite, and do not send a request again that was answered before."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable with the key of the servers, which is sent as a bearer token if it is set."""
