"""The OpenAPI document: bodies that handlers read for themselves, answers, errors and keys."""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from astrai_serve.api.envelopes import is_anthropic
from astrai_serve.api.response_models import AnthropicError, OpenAIError
from astrai_serve.api.settings import ServerSettings

_REFERENCE = "#/components/schemas/{model}"
_ERRORS = {
    400: "The request is wrong; the message names the parameter.",
    401: "No API key, or a wrong one.",
    403: "Asked by a name that is not this server's.",
    404: "No such model or address.",
    405: "The address takes another method.",
    413: "The body is larger than this server reads.",
    415: "The body is not declared as JSON.",
    429: "Too much work waits; `retry-after` says when to come back.",
    500: "The server failed.",
    503: "The server is shutting down.",
    504: "The answer took longer than this server allows.",
    529: "The server is shutting down.",
}
_ALWAYS = (401, 403, 405, 413)
_POSTED = (400, 415, 500)
_GENERATED = (404, 429, 504)


def body_of(model: type[BaseModel]) -> dict[str, Any]:
    """Describe the body of a route whose handler reads it."""
    schema = {"$ref": _REFERENCE.format(model=model.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def answers(
    path: str, model: type[BaseModel], *more: int, is_posted: bool = False, generates: bool = False
) -> dict[int | str, dict[str, Any]]:
    """Describe what a route answers.

    Args:
        path: tells the protocol.
        model: of the answer in one piece.
        *more: statuses of errors beside those that follow from the rest.
        is_posted: whether there is a body.
        generates: whether the engine is asked, and may stream.
    """
    unavailable = 529 if is_anthropic(path) else 503
    statuses = [*_ALWAYS, *more]
    statuses += _POSTED if is_posted else ()
    statuses += (*_GENERATED, unavailable) if generates else ()
    envelope = AnthropicError if is_anthropic(path) else OpenAIError
    told: dict[int | str, dict[str, Any]] = {
        status: {"model": envelope, "description": _ERRORS[status]}
        for status in sorted(set(statuses))
    }
    told[200] = {"model": model, "description": "The answer."}
    if generates:
        events = {"text/event-stream": {"schema": {"description": "Server-sent events."}}}
        told[200] |= {"description": "The answer, or with `stream` its events.", "content": events}
    return told


def describe(app: FastAPI, bodies: Sequence[type[BaseModel]], settings: ServerSettings) -> None:
    """Complete the document with the bodies and with who may ask."""
    _, definitions = models_json_schema(
        [(body, "validation") for body in bodies], ref_template=_REFERENCE
    )
    make = app.openapi

    def openapi() -> dict[str, Any]:
        document = make()
        components = document.setdefault("components", {})
        components.setdefault("schemas", {}).update(definitions["$defs"])
        for operations in document["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)  # FastAPI's own; ours is 400
                for response in operation["responses"].values():
                    for content in response.get("content", {}).values():
                        if "$ref" in content.get("schema", {}):
                            # FastAPI takes what a response class of our own gives for a string
                            content["schema"].pop("type", None)
        for name in ("HTTPValidationError", "ValidationError"):
            components["schemas"].pop(name, None)
        if settings.api_keys:
            components["securitySchemes"] = {
                "bearer": {"type": "http", "scheme": "bearer"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            }
            document["security"] = [{"bearer": []}, {"x-api-key": []}]
        return document

    app.openapi = openapi
