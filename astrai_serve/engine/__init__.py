"""The engine: continuous batching over a paged KV cache.

Names are loaded when first used, so that importing the package costs no torch.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from astrai_serve.engine.async_llm import AsyncLLM
    from astrai_serve.engine.config import EngineConfig
    from astrai_serve.engine.engine import InferenceEngine
    from astrai_serve.engine.llm import LLM
    from astrai_serve.engine.stream import TaskStream
    from astrai_serve.engine.task import (
        EngineClosedError,
        EngineError,
        Finish,
        QueueFullError,
        RefusedError,
        TaskEvent,
        TokenLogprob,
    )

__all__ = [
    "LLM",
    "AsyncLLM",
    "EngineClosedError",
    "EngineConfig",
    "EngineError",
    "Finish",
    "InferenceEngine",
    "QueueFullError",
    "RefusedError",
    "TaskEvent",
    "TaskStream",
    "TokenLogprob",
]

_MODULES = {
    "LLM": "llm",
    "AsyncLLM": "async_llm",
    "EngineConfig": "config",
    "InferenceEngine": "engine",
    "TaskStream": "stream",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_MODULES.get(name, 'task')}")
    return getattr(module, name)
