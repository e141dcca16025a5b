"""The model, its tokenizer and its files: torch only, no trainer, no server.

Names are loaded when first used, so that importing the package costs no torch.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from astrai_core.checkpoint import Checkpoint

__all__ = ["Checkpoint"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import astrai_core.checkpoint

    return getattr(astrai_core.checkpoint, name)
