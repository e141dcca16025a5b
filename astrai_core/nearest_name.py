"""What a person most likely meant by a name that does not exist."""

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, names: Iterable[str], *, prefix: str = "", cutoff: float = 0.6) -> str:
    """Return the end of a message: `; did you mean dim?`, or nothing where no name is near.

    Args:
        name: what was given.
        names: what there is.
        prefix: stands before the suggestion, as `--` does.
        cutoff: how alike the two must be, from 0 to 1; lower finds abbreviations among few names,
            higher keeps chance out among many.
    """
    near = difflib.get_close_matches(name, list(names), n=1, cutoff=cutoff)
    return f"; did you mean {prefix}{near[0]}?" if near else ""
