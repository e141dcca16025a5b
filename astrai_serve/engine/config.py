"""Settings of the engine; they are also the server's command-line options."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Sizes and limits of the engine.

    Raises:
        ValueError: a value is out of range or contradicts another one; the message names both.
    """

    page_size: int = 32
    """Tokens in a page of the KV cache."""
    num_pages: int | None = None
    """Pages in the KV cache; None takes as many as fit into `kv_cache_gb`."""
    kv_cache_gb: float | None = None
    """Memory for the KV cache in GB, used as it fills up; one full context always fits. None
    chooses by the weights and by the memory that is available when they are there."""
    kv_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the KV cache; auto is the model's own."""
    prefix_caching: bool = True
    """Keep the pages of finished tasks and reuse them for prompts that begin alike."""
    max_context: int | None = None
    """Longest prompt and answer together, in tokens; None is what the model was made for."""
    max_running_tasks: int = 32
    """Most tasks computed in one step."""
    max_queued_tasks: int = 256
    """Most tasks waiting; more are turned away with a clear error."""
    max_step_tokens: int = 384
    """Most tokens computed in one step, over all tasks. Longer steps prefill faster and make
    running answers wait longer."""
    max_chunk_tokens: int | None = None
    """Most tokens of one prompt computed in one step; None sets no limit of its own."""
    headroom_pages: int = 1
    """Pages that must stay free for each running task when another one is admitted."""
    speculative_tokens: int = 7
    """Most tokens guessed ahead in one step, where an answer repeats what was said before; 0 turns
    it off. Few answers at a time get faster, and none becomes another one."""
    reproducible: bool = False
    """Start only if an answer is sure to be the same to the last bit whatever else is computed. It
    costs nothing on a CPU with AVX2 and a compiler; elsewhere it is refused, with the reason."""
    num_threads: int | None = None
    """Threads for the arithmetic. None: the server takes what was best when it was measured, at the
    first start with this model on this machine; elsewhere it is PyTorch's choice."""
    stall_seconds: float = 60.0
    """A step that takes longer is reported as a hang by the health check."""

    def context_within(self, max_len: int) -> int:
        """Tokens of the longest prompt and answer, for a model that was made for `max_len`.

        Raises:
            ValueError: more are asked for.
        """
        if self.max_context is not None and self.max_context > max_len:
            raise ValueError(
                f"max_context {self.max_context} exceeds the model's max_len {max_len}: lower it, "
                "or leave it out to have all that the model was made for"
            )
        return self.max_context or max_len

    def __post_init__(self) -> None:
        positive = ("page_size", "max_running_tasks", "max_queued_tasks", "max_step_tokens")
        optional = ("num_pages", "max_context", "max_chunk_tokens", "num_threads")
        for name in positive + optional:
            value = getattr(self, name)
            if (value is not None or name in positive) and (type(value) is not int or value < 1):
                raise ValueError(f"{name} must be a positive integer, not {value!r}")
        for name in ("kv_cache_gb", "stall_seconds"):
            value = getattr(self, name)
            if not (name == "kv_cache_gb" and value is None) and not value > 0:
                raise ValueError(f"{name} must be above 0, not {value!r}")
        for name in ("headroom_pages", "speculative_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)!r}")
        if self.max_running_tasks > self.max_step_tokens:
            raise ValueError(
                f"max_running_tasks {self.max_running_tasks} exceeds max_step_tokens "
                f"{self.max_step_tokens}: every running task computes a token in each step; "
                "lower the first or raise the second"
            )
