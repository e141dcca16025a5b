"""Whether an answer depends, to the last bit, on nothing but its own request.

Integer sums do not depend on their order, and the compiled attention and fused operators treat each
token by itself. A product of floating-point matrices does not: how it is summed depends on how many
rows it has, and so on the rest of the batch.
"""

from astrai_core.model import Transformer
from astrai_core.model.quantization import scheme_of
from astrai_serve.engine.native_attention import why_not_native


def why_not_reproducible(model: Transformer) -> str | None:
    """What stands against it for this model on this machine, and the way out; None if nothing."""
    config = model.config
    if model.device.type != "cpu":
        return f"the model is on {model.device}, and only on a CPU is it known to hold"
    if config.attn_type == "mla":
        return "latent attention (MLA) multiplies matrices in floating point"
    if config.ffn_type == "moe":
        return "experts are chosen by a product in floating point"
    if scheme_of(model) != "w8a8":
        return "the weights are not w8a8: quantise them (--weights w8a8, or astrai-model quantize)"
    if (reason := why_not_native()) is not None:
        return f"the compiled attention is not to be had: {reason}"
    return None
