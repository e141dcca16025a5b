"""The one forward pass: training, evaluation and serving all run it.

Tokens are flattened on the way in: rows and documents concern the attention context alone.
Parameters carry Hugging Face's names, less the `model.` in front.
"""

import torch
from torch import Tensor, nn

from astrai_core.model.attention import GQA, MLA, Rotation
from astrai_core.model.attention_context import AttentionContext, PackedAttention
from astrai_core.model.config import ModelConfig
from astrai_core.model.feed_forward import MLP
from astrai_core.model.layers import INIT_STD, Embedding, Linear, RMSNorm, draw_
from astrai_core.model.lora import Adapter
from astrai_core.model.moe import DeepSeekMoE, Routing
from astrai_core.model.rotary import RotaryEmbedding


class DecoderBlock(nn.Module):
    """Attention and feed-forward network, each on a normed input and added to the stream."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.self_attn = MLA(config, layer) if config.attn_type == "mla" else GQA(config, layer)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        has_experts = config.ffn_type == "moe" and layer >= config.first_k_dense
        self.mlp = (
            DeepSeekMoE(config) if has_experts else MLP(config.dim, config.dim_ffn, config.ffn_bias)
        )

    def forward(
        self,
        x: Tensor,
        rotation: Rotation,
        attention: AttentionContext,
        routings: list[Routing] | None = None,
    ) -> Tensor:
        """Map the residual stream (N, dim) to the next block's; a router adds to `routings`."""
        x = x + self.self_attn(self.input_layernorm(x), rotation, attention)
        normed = self.post_attention_layernorm(x)
        if isinstance(self.mlp, DeepSeekMoE):
            return x + self.mlp(normed, routings)
        return x + self.mlp(normed)


class Transformer(nn.Module):
    """A decoder-only language model."""

    origin: dict[str, object] | None
    """`config.json` of the foreign folder it was loaded from, so that it is saved as one again."""

    adapter: Adapter | None
    """What its LoRA layers are, if it has any: it is saved as an adapter of its base then."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.origin = None
        self.adapter = None
        self.embed_tokens = Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(DecoderBlock(config, n) for n in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.lm_head = None if config.tie_weight else Linear(config.dim, config.vocab_size)
        rotary_dim = config.qk_rope_head_dim if config.attn_type == "mla" else config.query_dim
        self.rotary_embedding = RotaryEmbedding(rotary_dim, config.rope_theta, config.rope_scaling)
        self._scale_residual_outputs()

    def reset_parameters(self) -> None:
        """Draw all weights anew, as after `to_empty` on a model built on the meta device."""
        for module in self.modules():
            if module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters()  # pyright: ignore[reportCallIssue]
        self._scale_residual_outputs()

    def _scale_residual_outputs(self) -> None:
        # GPT-2's scaling: the residual stream is a sum of 2 x n_layers outputs, whose variance
        # should not grow with depth
        std = INIT_STD * (2 * self.config.n_layers) ** -0.5
        for name, parameter in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                draw_(parameter, std)

    @property
    def output_weight(self) -> nn.Parameter:
        """The output layer's matrix (vocab, dim), the embedding's own when tied.

        Raises:
            TypeError: it is quantised, so that there is no such matrix; `project` multiplies by it.
        """
        layer = self.embed_tokens if self.lm_head is None else self.lm_head
        if not layer.weight.is_floating_point():
            raise TypeError("the output layer is quantised: it has no matrix of numbers")
        return layer.weight

    @property
    def dtype(self) -> torch.dtype:
        """Type of the residual stream, whatever the matrices are stored in."""
        return self.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.norm.weight.device

    def hidden_states(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention: AttentionContext | None = None,
        routings: list[Routing] | None = None,
    ) -> Tensor:
        """Run all blocks and the final norm.

        Args:
            input_ids: token ids, (B, T) or, with an attention context, of any shape.
            position_ids: positions, shaped like `input_ids`; None counts from 0 in each row.
            attention: who sees whom; None is causal attention over each row of (B, T).
            routings: takes what each block with experts decided, for training to balance.

        Returns:
            Hidden states, the shape of `input_ids` with `dim` added.
        """
        if attention is None:
            if input_ids.dim() != 2:
                raise ValueError(
                    f"input_ids must be (rows, length) without an attention context, "
                    f"not {tuple(input_ids.shape)}"
                )
            attention = PackedAttention.of_rows(input_ids.shape[0], input_ids.shape[1])
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[-1], device=input_ids.device)
            position_ids = position_ids.expand(input_ids.shape)
        # rows of a quantised embedding are float32 whatever the rest is
        x = self.embed_tokens(input_ids.reshape(-1)).to(self.dtype)  # (N, dim)
        rotation = self.rotary_embedding(position_ids.reshape(-1))
        for block in self.layers:
            x = block(x, rotation, attention, routings)
        return self.norm(x).view(*input_ids.shape, -1)

    def project(self, hidden_states: Tensor) -> Tensor:
        """Map hidden states (..., dim) to logits (..., vocab)."""
        if self.lm_head is not None:
            return self.lm_head(hidden_states)
        return self.embed_tokens.project(hidden_states)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention: AttentionContext | None = None,
        logits_at: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Compute hidden states and logits.

        Args:
            input_ids: as for `hidden_states`.
            position_ids: as for `hidden_states`.
            attention: as for `hidden_states`.
            logits_at: (L,) indices into the flattened positions whose logits are wanted; None
                wants all.

        Returns:
            `hidden_states`, the shape of `input_ids` with `dim` added, and `logits`, (L, vocab) or
            the shape of `input_ids` with `vocab` added.
        """
        hidden = self.hidden_states(input_ids, position_ids, attention)
        wanted = hidden if logits_at is None else hidden.flatten(0, -2)[logits_at]
        return {"hidden_states": hidden, "logits": self.project(wanted)}
