"""How a model folder wants its model sampled: `generation_config.json`, Hugging Face's own keys."""

import json
from dataclasses import Field, dataclass, fields
from pathlib import Path
from typing import Any

from astrai_core.generation import SamplingParams

# what a request may ask for itself
_RANGES = {
    "temperature": (0, 2),
    "top_k": (0, 2**31 - 1),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repetition_penalty": (1e-3, 100),
    "max_new_tokens": (1, 2**31 - 1),
}
_INTEGERS = ("top_k", "max_new_tokens")

# what would change the text and is not done here; each with the values that change nothing
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "num_beams": (None, 1),
    "penalty_alpha": (None, 0),
    "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1),
    "typical_p": (None, 1),
    "top_h": (None,),
    "epsilon_cutoff": (None, 0),
    "eta_cutoff": (None, 0),
    "guidance_scale": (None, 1),
    "bad_words_ids": (None, []),
    "force_words_ids": (None, []),
    "constraints": (None, []),
    "sequence_bias": (None, [], {}),
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "exponential_decay_length_penalty": (None,),
    "stop_strings": (None, []),
    "watermarking_config": (None,),
}


@dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    """For requests that do not say."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int | None = None
    """Most new tokens of an answer for which nobody says, as far as the context has room."""

    @property
    def sampling(self) -> SamplingParams:
        """The same as parameters of the engine."""
        return SamplingParams(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=max(1e-9, self.top_p),
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            max_tokens=self.max_new_tokens,
        )

    @classmethod
    def read(cls, folder: Path) -> "GenerationDefaults":
        """Read a folder's wishes; without the file, nothing is filtered.

        Raises:
            ValueError: the file is not JSON, a value is out of range, or a key asks for what is not
                done here.
        """
        path = folder / "generation_config.json"
        if not path.is_file():
            return cls()
        try:
            content = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
        if not isinstance(content, dict):
            raise ValueError(f"{path} is not a JSON object")
        for name, neutral in _NEUTRAL.items():
            if content.get(name) not in neutral:
                raise ValueError(
                    f"{path}: {name} {content[name]!r} is not supported; take it out to serve the "
                    "model without it"
                )
        values = {field.name: _number(content, field, path) for field in fields(cls)}
        if content.get("do_sample") is False:  # the filters of drawing then mean nothing
            kept = {name: values[name] for name in ("repetition_penalty", "max_new_tokens")}
            return cls(temperature=0.0, **kept)
        return cls(**values)

    def __str__(self) -> str:
        """Name what differs from plain sampling."""
        told = [f"temperature {self.temperature:g}"]
        told += [f"top_k {self.top_k}"] if self.top_k else []
        told += [f"top_p {self.top_p:g}"] if self.top_p != 1 else []
        told += [f"min_p {self.min_p:g}"] if self.min_p else []
        penalty = self.repetition_penalty
        told += [f"repetition_penalty {penalty:g}"] if penalty != 1 else []
        limit = self.max_new_tokens
        told += [f"max_new_tokens {limit}"] if limit is not None else []
        return ", ".join(told)


def _number(content: dict[str, object], field: Field[Any], path: Path) -> Any:
    value = content.get(field.name)
    if value is None:
        return field.default
    least, most = _RANGES[field.name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise ValueError(
            f"{path}: {field.name} must be a number from {least:g} to {most:g}, not {value!r}"
        )
    return int(value) if field.name in _INTEGERS else value
