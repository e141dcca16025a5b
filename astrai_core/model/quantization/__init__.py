"""Quantised weights: schemes, layers, the kernels behind them, and folders that hold them."""

from astrai_core.model.quantization.description import (
    described_scheme,
    with_scheme,
    without_scheme,
)
from astrai_core.model.quantization.kernels import Choice, choose
from astrai_core.model.quantization.layers import (
    SCHEMES,
    Int4Linear,
    Int8Linear,
    QuantisedEmbedding,
    Scheme,
    W8A8Linear,
    quantised_tensors,
    quantize_,
    scheme_of,
)
from astrai_core.model.quantization.rounding import (
    dequantize,
    quantize_groups,
    quantize_rows,
    unpack,
)

__all__ = [
    "SCHEMES",
    "Choice",
    "Int4Linear",
    "Int8Linear",
    "QuantisedEmbedding",
    "Scheme",
    "W8A8Linear",
    "choose",
    "dequantize",
    "described_scheme",
    "quantised_tensors",
    "quantize_",
    "quantize_groups",
    "quantize_rows",
    "scheme_of",
    "unpack",
    "with_scheme",
    "without_scheme",
]
