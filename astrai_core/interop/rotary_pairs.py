"""Rows of a projection in the order of one rotary embedding or of the other.

Pairs of channels turn together: i with i + D/2 ("halves"), or 2i with 2i + 1 ("neighbours").
Reordering the rows that make queries and keys turns one into the other, and no score changes.
"""

from torch import Tensor


def to_neighbours(rows: Tensor, width: int) -> Tensor:
    """Reorder heads of `width` rows each from halves to neighbours.

    Args:
        rows: (heads * width, ...), a weight, bias or norm.
        width: rows of a head.
    """
    halves = rows.unflatten(0, (-1, 2, width // 2))  # (heads, 2, width / 2, ...)
    return halves.transpose(1, 2).flatten(0, 2).contiguous()


def to_halves(rows: Tensor, width: int) -> Tensor:
    """Reorder heads of `width` rows each from neighbours to halves."""
    pairs = rows.unflatten(0, (-1, width // 2, 2))  # (heads, width / 2, 2, ...)
    return pairs.transpose(1, 2).flatten(0, 2).contiguous()


def reorder_tail(rows: Tensor, width: int, tail: int, *, neighbours: bool) -> Tensor:
    """Reorder only the last `tail` rows of each head, as MLA rotates them.

    Args:
        rows: (heads * width, ...).
        width: rows of a head.
        tail: rotated rows at its end.
        neighbours: to neighbours; else to halves.
    """
    heads = rows.unflatten(0, (-1, width)).clone()  # (heads, width, ...)
    reorder = to_neighbours if neighbours else to_halves
    turned = heads[:, width - tail :]
    heads[:, width - tail :] = reorder(turned.flatten(0, 1), tail).view_as(turned)
    return heads.flatten(0, 1)
