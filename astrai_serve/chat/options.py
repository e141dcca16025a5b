"""The options of `astrai-chat`."""

import os
from dataclasses import dataclass, field
from pathlib import Path

import httpx2


def _history_file() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "astrai" / "chat_history"


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """Chat in the terminal with astrai-serve, or with any server that speaks OpenAI's protocol."""

    url: str = "http://127.0.0.1:8000"
    """Address of the server, with or without /v1."""
    model: str = ""
    """Model to ask for; empty takes the server's first one."""
    system: str = ""
    """System prompt."""
    temperature: float | None = None
    """0 always takes the most likely token; null leaves it to the server."""
    max_tokens: int | None = None
    """Longest answer; null leaves it to the server."""
    seed: int | None = None
    """Makes answers reproducible."""
    api_key_file: Path | None = None
    """File that holds the API key; without it the variable ASTRAI_API_KEY counts."""
    history_file: Path | None = field(default_factory=_history_file)
    """Where the lines you type are kept for the next time; null keeps them nowhere."""

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"--url must start with http:// or https://, not {self.url!r}")
        try:
            httpx2.URL(self.url)
        except httpx2.InvalidURL as error:
            raise ValueError(f"--url {self.url}: {error}") from None

    @property
    def host(self) -> str:
        """Name or address of the server."""
        return httpx2.URL(self.url).host

    @property
    def base(self) -> str:
        """Address of the protocol."""
        url = self.url.rstrip("/")
        return url if url.endswith("/v1") else url + "/v1"
