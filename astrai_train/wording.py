"""Figures as a person would say them."""


def duration(seconds: float) -> str:
    """Say a time, as `2 h 05 min` or `12 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def memory_size(num_bytes: int) -> str:
    """Say so many bytes, as `1.5 GB` or `300 MB`."""
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.0f} MB"


def place(step: int, total: int | None) -> str:
    """Say where a run stands, as `step 250 of 2,400`; without a total, as `step 250`."""
    return f"step {step:,}" + ("" if total is None else f" of {total:,}")
