"""How many pages the KV cache has, and why.

The rule, where nobody says: half of what the weights take, but at least 125 MB and at least one
full context; never more than all running tasks could use, each with a full context; and of the
memory that is available beyond a reserve, at most half, unless one context needs more. Where memory
does not suffice for one context, the context is as long as it can be.
"""

from dataclasses import dataclass

RESERVE = 500_000_000
"""Bytes of available memory that are left alone: for a step's intermediate results, for requests,
and for the machine's other programs."""
SMALLEST = 125_000_000
"""Bytes that even a small model's cache may take: five contexts of 4,096 tokens of a model of 53
million parameters, which so stays within 0.6 GB in all."""
_LEAST_TOKENS = 512
"""A shorter context than this is no use, however little memory there is."""


@dataclass(frozen=True, kw_only=True)
class PageBudget:
    """Pages of the KV cache."""

    num_pages: int
    why: str
    """The reason in words, for people."""


def choose_pages(
    *,
    page_bytes: int,
    context_pages: int,
    page_size: int,
    max_running_tasks: int,
    weight_bytes: int,
    available: int | None,
) -> PageBudget:
    """Choose by the rule above.

    Args:
        page_bytes: bytes of a page in all layers together.
        context_pages: pages of one full context.
        page_size: tokens in a page.
        max_running_tasks: most tasks at once.
        weight_bytes: bytes of the model's weights.
        available: bytes that can still be taken, the weights being there; None if not known.
    """
    context = context_pages * page_bytes
    most = max_running_tasks * context
    wish, why = max(SMALLEST, weight_bytes // 2), "half of what the weights take"
    if wish == SMALLEST:
        why = "a small model's share"
    if wish < context:
        wish, why = context, "one full context"
    if wish >= most:
        wish, why = most, f"{max_running_tasks} full contexts, all that can run"
    if available is None:
        return PageBudget(num_pages=wish // page_bytes, why=f"{why}; available memory is not known")
    spare = max(0, available - RESERVE)
    told = f"{available / 1e9:.1f} GB available, {RESERVE / 1e9:.1f} GB of them kept free"
    if wish > max(spare // 2, context):
        wish, why = max(spare // 2, context), "half of what is to spare"
        if wish == context:
            why = "one full context"
    if wish > spare:
        least = min(context_pages, -(-_LEAST_TOKENS // page_size))
        return PageBudget(
            num_pages=max(spare // page_bytes, least),
            why=f"memory does not suffice for a full context: {told}",
        )
    return PageBudget(num_pages=wish // page_bytes, why=f"{why}; {told}")
