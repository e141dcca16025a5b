"""How a line of the log is written: for people, or as JSON."""

import json
import logging
from datetime import UTC, datetime

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """Each record as a JSON object on a line of its own."""

    def format(self, record: logging.LogRecord) -> str:
        """Write a record with the fields that came with it."""
        fields: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_extra(record),
        }
        if record.exc_info:
            fields["error"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=True, default=str)


class TextFormatter(logging.Formatter):
    """Level, logger and message, then the fields that came with it as key=value."""

    def __init__(self) -> None:
        super().__init__("%(levelname)s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """Write a record."""
        told = [f"{key}={value!s}" for key, value in _extra(record).items()]
        return " ".join([super().format(record), *(text.replace("\n", " ") for text in told)])


def _extra(record: logging.LogRecord) -> dict[str, object]:
    return {key: value for key, value in vars(record).items() if key not in _STANDARD}
