"""Who sees whom. The model computes queries, keys and values; a context stores and attends.

The modules never ask whether there is a cache. Training passes `PackedAttention`; the serving
engine passes a context over its pages. One operation serves both kinds of attention:

            heads of q   heads of k   width of k     values
    GQA     H            KV           D              a tensor of width D
    MLA     H            1            r + rope       the key's first r entries (its latent)

N tokens, flattened; H query heads; KV key heads; G = H / KV; B rows of T tokens.
"""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from astrai_core.model.document_attention import attend_documents, can_attend_documents


class AttentionContext(ABC):
    """Stores the keys and values of a step's tokens and attends over all that a token may see."""

    @abstractmethod
    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor | int,
        *,
        scale: float,
        window: int | None = None,
    ) -> Tensor:
        """Softmax attention of the step's N tokens.

        Args:
            layer: index of the layer whose cache is meant.
            q: queries (N, H, Dk), already rotated.
            k: keys (N, KV, Dk), already rotated; query head h reads key head h // G.
            v: values (N, KV, Dv), or Dv when the values are the first Dv entries of the key.
            scale: factor on the scores.
            window: a token sees at most so many tokens, itself included; None sees all.

        Returns:
            (N, H, Dv), in the type of q.
        """


class PackedAttention(AttentionContext):
    """Causal attention inside the documents packed into rows; it keeps nothing.

    `document_ids` (B, T) says to which document of its row a token belongs; tokens of one
    document stand together. A negative id is padding, which sees only itself, so that no row of
    scores is empty. None in its place is one document in each row: the mask is then plain causal,
    which has a faster kernel.
    """

    def __init__(self, document_ids: Tensor | None, rows: tuple[int, int]):
        self.rows = rows
        self.document_ids = document_ids
        self._masks: dict[int | None, Tensor | None] = {}

    @classmethod
    def of_documents(cls, document_ids: Tensor) -> "PackedAttention":
        """Build from document ids (B, T)."""
        return cls(document_ids, (document_ids.shape[0], document_ids.shape[1]))

    @classmethod
    def of_rows(cls, num_rows: int, length: int) -> "PackedAttention":
        """Build for rows that are one document each."""
        return cls(None, (num_rows, length))

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor | int,
        *,
        scale: float,
        window: int | None = None,
    ) -> Tensor:
        """Attend within rows and documents; see the base class."""
        del layer
        if isinstance(v, int):
            v = k[..., :v]
        if self.document_ids is not None and can_attend_documents(q, k, v):
            return attend_documents(q, k, v, self.document_ids, scale, window)
        num_heads, num_kv_heads = q.shape[1], k.shape[1]
        q, k, v = self._as_rows(q), self._as_rows(k), self._as_rows(v)
        if num_heads != num_kv_heads:
            k = k.repeat_interleave(num_heads // num_kv_heads, dim=1)  # (B, H, T, D)
            v = v.repeat_interleave(num_heads // num_kv_heads, dim=1)
        mask = self._mask(window, q.device)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale
        )  # (B, H, T, Dv)
        return out.transpose(1, 2).reshape(-1, num_heads, v.shape[-1])

    def _as_rows(self, x: Tensor) -> Tensor:
        batch, length = self.rows
        return x.view(batch, length, x.shape[1], x.shape[2]).transpose(1, 2)  # (B, H, T, D)

    def _mask(self, window: int | None, device: torch.device) -> Tensor | None:
        """What each token sees, (B or 1, 1, T, T) bool, made once for all layers."""
        if window not in self._masks:
            self._masks[window] = self._build_mask(window, device)
        return self._masks[window]

    def _build_mask(self, window: int | None, device: torch.device) -> Tensor | None:
        length = self.rows[1]
        if self.document_ids is None and (window is None or window >= length):
            return None
        index = torch.arange(length, device=device)
        distance = index[:, None] - index[None, :]  # (T, T), query minus key
        mask = (distance >= 0)[None]
        if window is not None:
            mask = mask & (distance < window)
        if self.document_ids is not None:
            ids = self.document_ids
            same = (ids[:, :, None] == ids[:, None, :]) & (ids >= 0)[:, :, None]  # (B, T, T)
            mask = mask & (same | (distance == 0))
        return mask[:, None]
