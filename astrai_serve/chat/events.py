"""Server-sent events, however a server writes them."""

from collections.abc import Iterable, Iterator


def server_events(chunks: Iterable[bytes]) -> Iterator[str | None]:
    """Yield the data of each event, and None for a comment: a sign of life and no more.

    Lines end at LF, CR or both and nowhere else: text may hold other characters that Python takes
    for the end of a line.
    """
    data: list[str] = []
    for line in _lines(chunks):
        if not line and data:
            yield "\n".join(data)
            data = []
        elif line.startswith(b":"):
            yield None
        elif line.startswith(b"data:"):
            data.append(line[5:].removeprefix(b" ").decode())
    if data:
        yield "\n".join(data)


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    rest = b""
    for chunk in chunks:
        # a CR at the very end may be half of a CR LF
        rest = (rest + chunk).replace(b"\r\n", b"\n")
        whole, last = (rest[:-1], b"\r") if rest.endswith(b"\r") else (rest, b"")
        *lines, rest = whole.replace(b"\r", b"\n").split(b"\n")
        rest += last
        yield from lines
    yield from rest.replace(b"\r", b"\n").split(b"\n")
