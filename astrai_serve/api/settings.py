"""What an operator decides about the HTTP side."""

from dataclasses import dataclass, field

from astrai_serve.generation_defaults import GenerationDefaults


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Names, limits and who may ask.

    Raises:
        ValueError: a value is out of range; the message names it.
    """

    model_name: str
    """What clients call the model."""
    created: int = 0
    """When the model was made, in seconds since 1970."""
    defaults: GenerationDefaults = field(default_factory=GenerationDefaults)
    """How to sample for requests that do not say."""
    dtype: str = ""
    """Number format of the weights, as told in answers' fingerprint."""
    api_keys: frozenset[str] = frozenset()
    """Keys of which a request must carry one; none leaves the server open to whoever reaches it."""
    allowed_hosts: frozenset[str] | None = None
    """Names by which the server may be addressed; None asks nothing."""
    cors_origins: tuple[str, ...] = ()
    """Web pages of these origins may use the server."""
    max_body_bytes: int = 8 * 2**20
    """Largest request read."""
    max_prompt_tokens: int | None = None
    """Longest prompt taken; None leaves the context as the only limit."""
    max_seconds: float | None = None
    """Longest time for an answer, waiting included; None sets no limit."""
    ping_seconds: float = 10.0
    """A silent stream carries a sign of life so often."""
    log_requests: bool = False
    """Log each request: who, what, how long and how many tokens; never its text."""

    def __post_init__(self) -> None:
        if not self.model_name:
            raise ValueError("model_name must not be empty")
        if self.max_body_bytes < 1:
            raise ValueError(f"max_body_bytes must be at least 1, not {self.max_body_bytes}")
        if self.max_prompt_tokens is not None and self.max_prompt_tokens < 1:
            raise ValueError(f"max_prompt_tokens must be at least 1, not {self.max_prompt_tokens}")
        if self.max_seconds is not None and not self.max_seconds > 0:
            raise ValueError(f"max_seconds must be above 0, not {self.max_seconds}")
        if not self.ping_seconds > 0:
            raise ValueError(f"ping_seconds must be above 0, not {self.ping_seconds}")
