"""How rotary frequencies are changed so that a model reads further than it was trained to.

The fields are those of Hugging Face's `rope_scaling`; the arithmetic stands in `rotary.py`.
"""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """One rule and its numbers.

    Raises:
        ValueError: a number is out of range, or belongs to another rule.
    """

    rope_type: Literal["linear", "llama3", "yarn"]
    """Positions divided by the factor; Llama 3.1's rule by wavelength; YaRN (arXiv 2309.00071)."""
    factor: float
    """How many times further than it was trained to the model reads."""
    original_max_len: int | None = None
    """Context in tokens that the model was trained on; llama3 and yarn need it."""
    low_freq_factor: float | None = None
    """llama3: wavelengths above original_max_len / this are divided by the factor."""
    high_freq_factor: float | None = None
    """llama3: wavelengths below original_max_len / this stay."""
    beta_fast: float | None = None
    """yarn: channels that turn more often than this within original_max_len stay; None is 32."""
    beta_slow: float | None = None
    """yarn: channels that turn less often than this are divided by the factor; None is 1."""
    mscale: float | None = None
    """yarn: numerator of DeepSeek's temperature."""
    mscale_all_dim: float | None = None
    """yarn: denominator of DeepSeek's temperature, which then scales the scores of MLA."""
    attention_factor: float | None = None
    """yarn: multiplies cosines and sines; None follows from factor, or mscale and its partner."""
    truncate: bool = True
    """yarn: the bounds between the channels are whole numbers."""

    def __post_init__(self) -> None:
        numbers = {
            name: value
            for name, value in vars(self).items()
            if name not in ("rope_type", "truncate") and value is not None
        }
        for name, value in numbers.items():
            is_number = type(value) in (int, float) and math.isfinite(value) and value > 0
            if not is_number and not (name.startswith("mscale") and value == 0):
                raise ValueError(f"rope_scaling.{name} must be a positive number, not {value!r}")
        if self.factor < 1:
            raise ValueError(f"rope_scaling.factor must be at least 1, not {self.factor}")
        own = {
            "linear": set[str](),
            "llama3": {"low_freq_factor", "high_freq_factor"},
            "yarn": {"beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor"},
        }
        if self.rope_type not in own:
            raise ValueError(
                f"rope_scaling.rope_type must be one of {', '.join(own)}, not {self.rope_type!r}"
            )
        allowed = own[self.rope_type] | {"factor", "original_max_len"}
        extra = sorted(numbers.keys() - allowed)
        if extra:
            raise ValueError(
                f"rope_scaling.{', rope_scaling.'.join(extra)} do not belong to rope_type "
                f"{self.rope_type}"
            )
        if not isinstance(self.truncate, bool):
            raise ValueError(f"rope_scaling.truncate must be true or false, not {self.truncate!r}")
        needed = {"linear": [], "yarn": ["original_max_len"]}.get(
            self.rope_type, ["original_max_len", "low_freq_factor", "high_freq_factor"]
        )
        missing = [name for name in needed if name not in numbers]
        if missing:
            raise ValueError(
                f"rope_scaling.rope_type {self.rope_type} needs "
                f"rope_scaling.{', rope_scaling.'.join(missing)}"
            )
        low, high = self.low_freq_factor, self.high_freq_factor
        if low is not None and high is not None and low >= high:
            raise ValueError(
                f"rope_scaling.high_freq_factor {high} must exceed rope_scaling.low_freq_factor "
                f"{low}"
            )
