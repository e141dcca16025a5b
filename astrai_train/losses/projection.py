"""The output layer and its gradients, in chunks: logits of all positions never exist at once.

N scored positions; dim is the model's width, vocab the rows of its output matrix.

Two sizes matter. Few rows of logits stay in the cache from the product that makes them to the one
that takes their slope back to the hidden states. But each product for the matrix's own gradient
adds (vocab, dim) numbers to those before, which is worth doing for many rows at a time. So slopes
are made row by row into a block, and a block is one such product.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

_ROWS = 256
"""Rows of a chunk."""
_BLOCK_BYTES = 64 << 20
"""Slopes of a block, where that is more than a chunk."""


def product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The type in which hidden states meet the output matrix: autocast's, where it is on."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype


def chunks(start: int, stop: int) -> Iterator[slice]:
    """Rows of logits to have at a time."""
    for first in range(start, stop, _ROWS):
        yield slice(first, min(first + _ROWS, stop))


def blocks(num_rows: int, matrix: Tensor) -> Iterator[slice]:
    """Rows, in whole chunks, whose slopes are kept for one product with the hidden states."""
    size = block_rows(matrix.shape[0], matrix.element_size())
    for first in range(0, num_rows, size):
        yield slice(first, min(first + size, num_rows))


def block_rows(vocab: int, num_bytes: int) -> int:
    """The most rows of a block, of slopes that take so many bytes each."""
    fitting = _BLOCK_BYTES // (vocab * num_bytes)
    return max(1, fitting // _ROWS) * _ROWS


def logit_buffer(num_rows: int, matrix: Tensor) -> Tensor:
    """Room for the logits of the largest block of so many rows."""
    largest = next(blocks(num_rows, matrix), slice(0, 0)).stop
    return matrix.new_empty(largest, matrix.shape[0])


class OutputGradients:
    """Gradients of hidden states and output matrix, gathered block by block.

    Args:
        hidden: (N, dim), in the type of the products.
        matrix: (vocab, dim), in the same.
        wants_hidden: whether the first is asked for.
        wants_weight: whether the second is.
    """

    def __init__(
        self, hidden: Tensor, matrix: Tensor, *, wants_hidden: bool, wants_weight: bool
    ) -> None:
        self._matrix = matrix
        self._states = hidden
        self.hidden = torch.zeros_like(hidden) if wants_hidden else None
        """(N, dim), in the type of the products."""
        self.weight: Tensor | None = None
        """(vocab, dim) float32 or wider; None until there is a block."""
        self._wants_weight = wants_weight

    def add_chunk(self, rows: slice, slopes: Tensor) -> None:
        """Take the slopes (rows, vocab) of the loss with respect to a chunk's logits."""
        if self.hidden is not None:
            torch.mm(slopes, self._matrix, out=self.hidden[rows])

    def add_block(self, rows: slice, slopes: Tensor) -> None:
        """Take those of a block, whose chunks were all taken."""
        if not self._wants_weight:
            return
        product = slopes.T @ self._states[rows]
        if self.weight is None:
            self.weight = product.to(torch.promote_types(product.dtype, torch.float32))
        else:
            self.weight += product

    def weight_like(self, weight: Tensor) -> Tensor | None:
        """The matrix's gradient in the type of its master copy; zeros without any block."""
        if not self._wants_weight:
            return None
        return torch.zeros_like(weight) if self.weight is None else self.weight.to(weight.dtype)
