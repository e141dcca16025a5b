"""Errors in the words of the protocol whose address was asked.

OpenAI's envelope is the rule; addresses under /v1/messages answer as Anthropic does.
"""

from collections.abc import Mapping

from starlette.types import Scope

from astrai_serve.api.anthropic_errors import error_body as anthropic_body
from astrai_serve.api.anthropic_errors import status_of
from astrai_serve.api.errors import ApiError
from astrai_serve.api.openai import error_response as openai_response
from astrai_serve.api.protocol import JsonResponse

ANTHROPIC_PATH = "/v1/messages"


def error_response(error: ApiError, scope: Scope) -> JsonResponse:
    """An answer that is an error, to the request of a scope."""
    if not is_anthropic(scope["path"]):
        return openai_response(error)
    body: Mapping[str, object] = anthropic_body(error, request_id(scope))
    return JsonResponse(body, status_code=status_of(error), headers=error.headers)


def is_anthropic(path: str) -> bool:
    """Whether an address is one of Anthropic's."""
    return path == ANTHROPIC_PATH or path.startswith(f"{ANTHROPIC_PATH}/")


def request_id(scope: Scope) -> str | None:
    """The id that the response will carry."""
    return scope.get("state", {}).get("request_id")
