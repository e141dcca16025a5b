"""Serving: the paged engine and its HTTP interface.

Names are loaded when first used, so that importing the package costs no torch.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from astrai_serve.engine import LLM, AsyncLLM, InferenceEngine

__all__ = ["LLM", "AsyncLLM", "InferenceEngine"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import astrai_serve.engine

    return getattr(astrai_serve.engine, name)
