"""Losses as pure functions: tensors in, a sum and a count out.

Only the caller knows over what to average: a window of micro-batches on all ranks.
"""

from astrai_train.losses.likelihood import IGNORED, cross_entropy, smoothed_cross_entropy
from astrai_train.losses.log_probabilities import token_logprobs

__all__ = ["IGNORED", "cross_entropy", "smoothed_cross_entropy", "token_logprobs"]
