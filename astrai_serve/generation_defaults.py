"""How a model folder wants its model sampled: `generation_config.json`, Hugging Face's own keys."""

import json
from dataclasses import Field, dataclass, fields
from pathlib import Path
from typing import Any

# what a request may ask for itself
_RANGES = {
    "temperature": (0, 2),
    "top_k": (0, 2**31 - 1),
    "top_p": (0, 1),
    "repetition_penalty": (1e-3, 100),
}


@dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    """For requests that do not say."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    @classmethod
    def read(cls, folder: Path) -> "GenerationDefaults":
        """Read a folder's wishes; without the file, nothing is filtered.

        Raises:
            ValueError: the file is not JSON, or a value is out of range.
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
        if content.get("do_sample") is False:
            return cls(temperature=0.0)
        values = {field.name: _number(content, field, path) for field in fields(cls)}
        return cls(**values | {"top_k": int(values["top_k"])})

    def __str__(self) -> str:
        """Name what differs from plain sampling."""
        told = [f"temperature {self.temperature:g}"]
        told += [f"top_k {self.top_k}"] if self.top_k else []
        told += [f"top_p {self.top_p:g}"] if self.top_p != 1 else []
        penalty = self.repetition_penalty
        told += [f"repetition_penalty {penalty:g}"] if penalty != 1 else []
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
    return value
