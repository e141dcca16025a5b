"""Who computes: threads of ours, of torch's, or both.

Two pools of threads on the same cores take them from each other: each spins for a while when its
loop is over, and the other's next loop waits until the scheduler steps in, milliseconds later.
"""

import torch

from astrai_core.model import Transformer
from astrai_core.model.packed import why_not_packed
from astrai_core.model.quantization import scheme_of
from astrai_serve.engine.native_attention import why_not_native


def is_native(model: Transformer) -> bool:
    """Whether nearly all of a step of this model is our own compiled operators'."""
    return (
        model.device.type == "cpu"
        and scheme_of(model) == "w8a8"
        and model.config.attn_type == "gqa"
        and model.config.ffn_type == "mlp"
        and why_not_packed() is None
        and why_not_native() is None
    )


def use_threads(threads: int, is_native: bool) -> None:
    """Set the number of threads for steps, in the thread that runs them.

    Args:
        threads: how many.
        is_native: torch computes the little that is left on one thread, and its pool sleeps.
    """
    if is_native:
        torch.ops.astrai_packed.use_threads(threads)
    torch.set_num_threads(1 if is_native else threads)
