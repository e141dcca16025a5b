"""Two ways to attend: grouped queries, and DeepSeek's latent. Neither knows of rows or caches.

N tokens, flattened; H query heads; KV key heads; D head width.
MLA: r latent width, P unrotated ("nope") width, R rotated width, V value width.
"""

import torch
from torch import Tensor, nn

from astrai_core.model.attention_context import AttentionContext
from astrai_core.model.config import ModelConfig
from astrai_core.model.layers import Linear, RMSNorm
from astrai_core.model.rotary import latent_score_factor, rotate

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines of the tokens' positions, (N, D/2) each."""


class GQA(nn.Module):
    """Grouped-query attention (arXiv 2305.13245): H / KV query heads share a key and value head."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.n_heads, self.n_kv_heads = config.n_heads, config.num_kv_heads
        self.head_dim = config.query_dim
        self.window = config.window(layer)
        width, bias = self.head_dim, config.attention_bias
        self.q_proj = Linear(config.dim, self.n_heads * width, bias)
        self.k_proj = Linear(config.dim, self.n_kv_heads * width, bias)
        self.v_proj = Linear(config.dim, self.n_kv_heads * width, bias)
        self.o_proj = Linear(self.n_heads * width, config.dim, config.attention_output_bias)
        self.is_interleaved = config.rope_interleaved
        self.q_norm = RMSNorm(width, config.norm_eps) if config.use_qk_norm else None
        self.k_norm = RMSNorm(width, config.norm_eps) if config.use_qk_norm else None
        self.gate_proj = make_gate(config, width)

    def forward(self, x: Tensor, rotation: Rotation, attention: AttentionContext) -> Tensor:
        """Map the normed block input (N, dim) to the attention's output (N, dim)."""
        q = self.q_proj(x).view(-1, self.n_heads, self.head_dim)  # (N, H, D)
        k = self.k_proj(x).view(-1, self.n_kv_heads, self.head_dim)  # (N, KV, D)
        v = self.v_proj(x).view(-1, self.n_kv_heads, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)  # before the rotation, as Qwen3 does
        q = rotate(q, *rotation, interleaved=self.is_interleaved)
        k = rotate(k, *rotation, interleaved=self.is_interleaved)
        out = attention.attend(
            self.layer, q, k, v, scale=self.head_dim**-0.5, window=self.window
        )  # (N, H, D)
        if self.gate_proj is not None:
            out = apply_gate(out, self.gate_proj(x))
        return self.o_proj(out.flatten(1))


class MLA(nn.Module):
    """Multi-head latent attention (arXiv 2405.04434): a token's keys and values are one latent.

    With W_kv_b split per head into W_k (P, r) and W_v (V, r), the score of a head is
    q_nope . W_k c + q_rope . k_rope = (W_k^T q_nope) . c + q_rope . k_rope, and its output
    sum p W_v c = W_v sum p c. So the context only ever sees the latent c and the rotated key,
    one shared head of width r + R ("absorbed"). In training, where nothing is cached, the heads
    are built out instead: the same numbers with less work, since P + R is well below r + R.
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.window = config.window(layer)
        self.n_heads = config.n_heads
        self.rank, self.v_dim = config.kv_lora_rank, config.v_head_dim
        self.nope_dim, self.rope_dim = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.scale = config.query_dim**-0.5 * latent_score_factor(config.rope_scaling)
        self.is_interleaved = config.rope_interleaved
        q_width = self.n_heads * config.query_dim
        if config.q_lora_rank is None:
            self.q_proj = Linear(config.dim, q_width)
            self.q_a_proj = self.q_a_layernorm = self.q_b_proj = None
        else:
            self.q_proj = None
            self.q_a_proj = Linear(config.dim, config.q_lora_rank, config.attention_bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, config.latent_norm_eps)
            self.q_b_proj = Linear(config.q_lora_rank, q_width)
        self.kv_a_proj_with_mqa = Linear(
            config.dim, self.rank + self.rope_dim, config.attention_bias
        )
        self.kv_a_layernorm = RMSNorm(self.rank, config.latent_norm_eps)
        self.kv_b_proj = Linear(self.rank, self.n_heads * (self.nope_dim + self.v_dim))
        self.o_proj = Linear(self.n_heads * self.v_dim, config.dim, config.attention_output_bias)
        self.gate_proj = make_gate(config, self.v_dim)

    def forward(self, x: Tensor, rotation: Rotation, attention: AttentionContext) -> Tensor:
        """Map the normed block input (N, dim) to the attention's output (N, dim)."""
        q = self._queries(x).view(-1, self.n_heads, self.nope_dim + self.rope_dim)
        q_nope, q_rope = q.split((self.nope_dim, self.rope_dim), dim=-1)
        q_rope = rotate(q_rope, *rotation, interleaved=self.is_interleaved)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split((self.rank, self.rope_dim), dim=-1)
        latent = self.kv_a_layernorm(latent)[:, None]  # (N, 1, r)
        k_rope = rotate(k_rope[:, None], *rotation, interleaved=self.is_interleaved)  # (N, 1, R)
        attend = self._attend_heads if self.training else self._attend_latent
        out = attend(q_nope, q_rope, latent, k_rope, attention)  # (N, H, V)
        if self.gate_proj is not None:
            out = apply_gate(out, self.gate_proj(x))
        return self.o_proj(out.flatten(1))

    def _queries(self, x: Tensor) -> Tensor:
        if self.q_proj is not None:
            return self.q_proj(x)
        assert self.q_a_proj is not None
        assert self.q_a_layernorm is not None
        assert self.q_b_proj is not None
        return self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))

    def _attend_heads(
        self,
        q_nope: Tensor,
        q_rope: Tensor,
        latent: Tensor,
        k_rope: Tensor,
        attention: AttentionContext,
    ) -> Tensor:
        heads = self.kv_b_proj(latent[:, 0]).view(-1, self.n_heads, self.nope_dim + self.v_dim)
        k_nope, v = heads.split((self.nope_dim, self.v_dim), dim=-1)  # (N, H, P), (N, H, V)
        q = torch.cat((q_nope, q_rope), dim=-1)
        k = torch.cat((k_nope, k_rope.expand(-1, self.n_heads, -1)), dim=-1)
        return attention.attend(self.layer, q, k, v, scale=self.scale, window=self.window)

    def _attend_latent(
        self,
        q_nope: Tensor,
        q_rope: Tensor,
        latent: Tensor,
        k_rope: Tensor,
        attention: AttentionContext,
    ) -> Tensor:
        weight = self.kv_b_proj.weight.view(self.n_heads, self.nope_dim + self.v_dim, self.rank)
        to_key, to_value = weight.split((self.nope_dim, self.v_dim), dim=1)  # (H, P, r), (H, V, r)
        q_latent = torch.einsum("nhp,hpr->nhr", q_nope, to_key)
        q = torch.cat((q_latent, q_rope), dim=-1)  # (N, H, r + R)
        k = torch.cat((latent, k_rope), dim=-1)  # (N, 1, r + R)
        mixed = attention.attend(
            self.layer, q, k, self.rank, scale=self.scale, window=self.window
        )  # (N, H, r)
        return torch.einsum("nhr,hvr->nhv", mixed, to_value)


def make_gate(config: ModelConfig, value_dim: int) -> Linear | None:
    """The gate's projection, to one number for each head or for each of its channels."""
    if not config.use_gated_attention:
        return None
    width = value_dim if config.attention_gate == "elementwise" else 1
    return Linear(config.dim, config.n_heads * width)


def apply_gate(out: Tensor, gate: Tensor) -> Tensor:
    """Scale heads (N, H, D) by the sigmoid of gate (N, H) or (N, H * D), before W_o."""
    return out * gate.sigmoid().view(out.shape[0], out.shape[1], -1)
