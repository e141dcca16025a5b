"""The model: its configuration, its forward pass and its folders."""

from astrai_core.model.attention_context import AttentionContext, PackedAttention
from astrai_core.model.auto import AutoModel
from astrai_core.model.config import ModelConfig
from astrai_core.model.transformer import DecoderBlock, Transformer

__all__ = [
    "AttentionContext",
    "AutoModel",
    "DecoderBlock",
    "ModelConfig",
    "PackedAttention",
    "Transformer",
]
