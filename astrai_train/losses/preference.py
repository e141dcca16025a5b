"""Losses of pairs: what one answer's likelihood should gain on another's.

P pairs; column 0 is the chosen side, column 1 the rejected one. A score is how much likelier the
policy makes an answer than the reference does: log p(answer) - log p_ref(answer).
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

PreferenceLoss = Literal[
    "sigmoid", "sigmoid_norm", "robust", "ipo", "hinge", "apo_zero", "apo_down"
]
Reduction = Literal["sum", "mean"]

SMOOTHED: tuple[PreferenceLoss, ...] = ("sigmoid", "sigmoid_norm", "robust")
"""Losses that label smoothing means something to."""
_PER_TOKEN: tuple[PreferenceLoss, ...] = ("sigmoid_norm", "ipo")


def check_preference(loss: PreferenceLoss, beta: float, label_smoothing: float) -> None:
    """Refuse what the loss does not define.

    Raises:
        ValueError: says which option, its value and the way out.
    """
    if loss not in get_args(PreferenceLoss):
        raise ValueError(f"loss must be one of {', '.join(get_args(PreferenceLoss))}, not {loss}")
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta must be above 0, not {beta}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(
            f"label_smoothing is the share of pairs labelled the wrong way round: at least 0 and "
            f"below 0.5, not {label_smoothing}"
        )
    if label_smoothing and loss not in SMOOTHED:
        raise ValueError(
            f"label_smoothing {label_smoothing} means nothing to loss {loss}; set it to 0, or use "
            f"loss {' or '.join(SMOOTHED)}"
        )


def sequence_logprobs(
    logprobs: Tensor, labels_kept: Tensor, document_ids: Tensor, num_sequences: int
) -> tuple[Tensor, Tensor]:
    """Add up packed tokens by the sequence they belong to, in float32.

    Args:
        logprobs: of each token, any shape.
        labels_kept: which of them count, the same shape.
        document_ids: number of the sequence, the same shape; negative for none.
        num_sequences: how many sequences there are, S.

    Returns:
        (S,) sums and (S,) numbers of tokens.
    """
    kept = labels_kept & (document_ids >= 0)
    sequence = document_ids[kept]
    values = logprobs[kept].float()
    sums = torch.zeros(num_sequences, dtype=values.dtype, device=values.device)
    return (
        sums.index_add(0, sequence, values),
        torch.bincount(sequence, minlength=num_sequences),
    )


def preference_losses(
    scores: Tensor,
    lengths: Tensor,
    *,
    loss: PreferenceLoss = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    reduction: Reduction = "sum",
) -> Tensor:
    """The loss of each pair.

        sigmoid       -log s(b d)                                     Rafailov et al. 2023
          smoothed    -(1 - e) log s(b d) - e log s(-b d)             cDPO
        robust        (-(1 - e) log s(b d) + e log s(-b d)) / (1 - 2e)
        ipo           (d - 1 / 2b)^2
        hinge         max(0, 1 - b d)
        apo_zero      s(-b c) + s(b r)                                both absolute
        apo_down      s(b c) + s(-b d)

    with s the logistic function, b = beta, e = label_smoothing, c and r the two scores and d their
    difference.

    Args:
        scores: (P, 2), summed over the tokens of an answer.
        lengths: (P, 2) numbers of those tokens.
        loss: which of them; sigmoid_norm is sigmoid with reduction mean.
        beta: how strongly the policy is held to the reference.
        label_smoothing: the share of pairs that may be labelled the wrong way round.
        reduction: whether an answer's score is the sum over its tokens or their mean. ipo and
            sigmoid_norm take the mean always.

    Returns:
        (P,)
    """
    if reduction == "mean" or loss in _PER_TOKEN:
        scores = scores / lengths.clamp(min=1)
    chosen, rejected = scores.unbind(1)
    gain = beta * (chosen - rejected)
    match loss:
        case "sigmoid" | "sigmoid_norm":
            kept, swapped = F.logsigmoid(gain), F.logsigmoid(-gain)
            return -(1 - label_smoothing) * kept - label_smoothing * swapped
        case "robust":
            kept, swapped = F.logsigmoid(gain), F.logsigmoid(-gain)
            clean = -(1 - label_smoothing) * kept + label_smoothing * swapped
            return clean / (1 - 2 * label_smoothing)
        case "ipo":
            return (chosen - rejected - 1 / (2 * beta)).square()
        case "hinge":
            return (1 - gain).relu()
        case "apo_zero":
            return (-beta * chosen).sigmoid() + (beta * rejected).sigmoid()
        case "apo_down":
            return (beta * chosen).sigmoid() + (-gain).sigmoid()
