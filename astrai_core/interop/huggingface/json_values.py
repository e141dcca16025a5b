"""Values of a `config.json`, checked as they are read."""

Json = dict[str, object]


def given(config: Json, key: str, default: object = None) -> object:
    """A key's value; one that is null counts as absent."""
    value = config.get(key)
    return default if value is None else value


def number(value: object, name: str) -> float:
    """A number.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} must be a number, not {value!r}")
    return value


def count(value: object, name: str) -> int:
    """A whole number from 0 on.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name} must be an integer of 0 or more, not {value!r}")
    return value


def told(value: object) -> str:
    """A value for an error, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
