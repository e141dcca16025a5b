"""What a client can be told, before any protocol gives it a shape.

A handler raises one of these; the envelope is put around it at the edge, as a response or, once
the first byte is out, inside the stream.
"""

from collections.abc import Mapping, Sequence

from pydantic import ValidationError

_SHOWN_VALUE = 60
_WORDING = (
    ("Input should be", "must be"),
    ("Field required", "is required"),
    ("List should have", "must have"),
    ("String should have", "must have"),
    (" after validation", ""),
    (" or instance of StreamOptions", ""),
    (" or instance of ChatMessage", ""),
    (" or instance of TextPart", ""),
)


class ApiError(Exception):
    """An answer other than the one asked for.

    ApiError
    ├── InvalidRequestError       400  the request itself is wrong
    │   └── ContextLengthError    400  it does not fit into the context or the memory
    ├── AuthenticationError       401  no key, or a wrong one
    ├── ForbiddenError            403  a Host that is not ours
    ├── NotFoundError             404  no such model, no such address
    ├── MethodNotAllowedError     405  the address takes another method
    ├── BodyTooLargeError         413
    ├── MediaTypeError            415  not JSON
    ├── BusyError                 429  too much work waits; with a time to come back
    ├── InternalError             500  our fault
    ├── UnavailableError          503  shutting down
    └── TimeLimitError            504  the answer took longer than this server allows

    Args:
        message: one line that names the parameter, the value and the way out.
        param: the parameter at fault, as a path into the request.
        code: a word for programs.
        retry_after: seconds after which trying again makes sense.
    """

    status = 500
    type = "server_error"
    code: str | None = None

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or self.code
        self.retry_after = retry_after

    @property
    def headers(self) -> dict[str, str]:
        """Headers that go with the status."""
        return {} if self.retry_after is None else {"retry-after": str(self.retry_after)}


class InvalidRequestError(ApiError):
    """The request is wrong and stays wrong however often it is sent."""

    status = 400
    type = "invalid_request_error"


class ContextLengthError(InvalidRequestError):
    """Prompt and answer do not fit into the context or the KV cache."""

    code = "context_length_exceeded"


class AuthenticationError(ApiError):
    """No API key, or one that we do not know."""

    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"

    @property
    def headers(self) -> dict[str, str]:
        """Names the scheme, as the status demands."""
        return {"www-authenticate": "Bearer"}


class ForbiddenError(ApiError):
    """The request was made to a name that is not ours."""

    status = 403
    type = "invalid_request_error"
    code = "host_not_allowed"


class NotFoundError(ApiError):
    """No such address or model."""

    status = 404
    type = "invalid_request_error"
    code = "not_found"


class MethodNotAllowedError(ApiError):
    """The address exists and takes another method.

    Args:
        message: one line.
        allow: headers that name the methods it takes.
    """

    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"

    def __init__(self, message: str, allow: Mapping[str, str] | None = None):
        super().__init__(message)
        self.allow = dict(allow or {})

    @property
    def headers(self) -> dict[str, str]:
        """Name the methods, as the status demands."""
        return self.allow


class BodyTooLargeError(ApiError):
    """More bytes than the server reads."""

    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


class MediaTypeError(ApiError):
    """The body is not declared as JSON."""

    status = 415
    type = "invalid_request_error"
    code = "unsupported_media_type"


class BusyError(ApiError):
    """Too many requests are waiting, or the answer would come later than the client waits."""

    status = 429
    type = "rate_limit_error"
    code = "queue_full"


class InternalError(ApiError):
    """Something of ours broke; the same request would break it again."""

    code = "internal_error"

    @property
    def headers(self) -> dict[str, str]:
        """Keeps OpenAI's clients from trying again."""
        return {"x-should-retry": "false"}


class UnavailableError(ApiError):
    """The server is shutting down."""

    status = 503
    code = "shutting_down"


class TimeLimitError(ApiError):
    """The answer took longer than any may; trying again would take as long."""

    status = 504
    code = "time_limit"

    @property
    def headers(self) -> dict[str, str]:
        """Keeps clients from trying again."""
        return {"x-should-retry": "false"}


def from_validation(error: ValidationError, data: object) -> InvalidRequestError:
    """Turn pydantic's findings about `data` into one line about the first parameter at fault."""
    findings = error.errors(include_url=False, include_context=False)
    paths = [_path(found["loc"], data, found["type"] == "missing") for found in findings]
    # of the members of a union, the one that reads furthest is the one that was meant
    path = max((path for path in paths if path[:1] == paths[0][:1]), key=len)
    here = [found for found, where in zip(findings, paths, strict=True) if where == path]
    texts = list(dict.fromkeys(_sentence(found["msg"]) for found in here))
    param = _dotted(path)
    shown = _shown(here[0]["input"]) if here[0]["type"] != "missing" else ""
    return InvalidRequestError(
        f"{param}: {' or '.join(texts)}{shown}" if param else " or ".join(texts),
        param=param or None,
    )


def _path(location: Sequence[int | str], data: object, is_missing: bool) -> tuple[int | str, ...]:
    """Keep of a location what leads through `data`; pydantic adds the names of union members."""
    path: list[int | str] = []
    for step in location:
        if isinstance(data, Mapping):
            # what is not there is the absent key that is told of, or the name of a union member
            if step not in data and not (is_missing and step == location[-1]):
                continue
            data = data.get(step)
        elif isinstance(data, list) and isinstance(step, int):
            data = data[step]
        else:
            continue
        path.append(step)
    return tuple(path)


def _dotted(path: tuple[int | str, ...]) -> str:
    steps = (f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return "".join(steps).removeprefix(".")


def _sentence(message: str) -> str:
    for theirs, ours in _WORDING:
        message = message.replace(theirs, ours)
    return message


def _shown(value: object) -> str:
    if not isinstance(value, str | int | float | bool | None):
        return ""
    text = repr(value)
    return f", not {text if len(text) <= _SHOWN_VALUE else text[:_SHOWN_VALUE] + '...'}"
