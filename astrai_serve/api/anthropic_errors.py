"""Anthropic's words for errors: its envelope, its types, and 529 for an overloaded server."""

from astrai_serve.api.errors import ApiError

OVERLOADED = 529
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    504: "timeout_error",
    OVERLOADED: "overloaded_error",
}


def status_of(error: ApiError) -> int:
    """The status that Anthropic gives such an error."""
    return OVERLOADED if error.status == 503 else error.status


def error_body(error: ApiError, request_id: str | None) -> dict[str, object]:
    """The envelope that Anthropic's clients turn into their exceptions, streamed or not."""
    kind = _TYPES.get(status_of(error), "invalid_request_error")
    told = {"type": kind, "message": error.message}
    return {"type": "error", "error": told, "request_id": request_id}
