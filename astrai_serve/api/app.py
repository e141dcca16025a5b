"""The web application: which address leads where."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from importlib.metadata import version

import anyio
import anyio.to_thread
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from astrai_serve.api.backend import Engine
from astrai_serve.api.errors import (
    ApiError,
    InternalError,
    InvalidRequestError,
    MethodNotAllowedError,
    NotFoundError,
)
from astrai_serve.api.guards import Guard, RequestIds
from astrai_serve.api.openai import ChatHandler, CompletionHandler, error_response
from astrai_serve.api.openai_requests import (
    ChatCompletionRequest,
    CompletionRequest,
    check_model,
)
from astrai_serve.api.page import add_page
from astrai_serve.api.protocol import JsonResponse, ProtocolHandler
from astrai_serve.api.settings import ServerSettings
from astrai_serve.api.shutdown import Shutdown

_CLOSE_SECONDS = 2.0
_REFERENCE = "#/components/schemas/{model}"


def create_app(
    engine: Engine, settings: ServerSettings, shutdown: Shutdown | None = None
) -> FastAPI:
    """Build the application around an engine, which it closes when it ends.

    Args:
        engine: generates; it must have a tokenizer.
        settings: names, limits and who may ask.
        shutdown: how whoever runs the application stops it.

    Raises:
        ValueError: the engine has no tokenizer.
    """
    tokenizer = engine.tokenizer
    if tokenizer is None:
        raise ValueError("the engine has no tokenizer, and HTTP clients speak text")
    shutdown = shutdown or Shutdown()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        shutdown.interrupt()
        await anyio.to_thread.run_sync(engine.close, _CLOSE_SECONDS)

    app = FastAPI(
        title="AstrAI",
        version=version("astrai"),
        lifespan=lifespan,
        docs_url=None,  # its page would load scripts from elsewhere
        redoc_url=None,
    )
    limiter = anyio.CapacityLimiter(1)
    chat = ChatHandler(engine, tokenizer, settings, shutdown, limiter)
    completion = CompletionHandler(engine, tokenizer, settings, shutdown, limiter)
    _add_generation(app, "/v1/chat/completions", chat, ChatCompletionRequest)
    _add_generation(app, "/v1/completions", completion, CompletionRequest)
    _describe(app, [ChatCompletionRequest, CompletionRequest])
    _add_information(app, engine, settings)
    add_page(app, _about(settings))
    _add_errors(app)
    # the last one added is the first one asked
    app.add_middleware(Guard, settings=settings, refuse=error_response)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    app.add_middleware(RequestIds)
    return app


def _add_generation(
    app: FastAPI, path: str, handler: ProtocolHandler, body: type[BaseModel]
) -> None:
    """Route a path to a handler, which reads the body itself; the schema is for readers."""
    schema = {"$ref": _REFERENCE.format(model=body.__name__)}
    content = {"application/json": {"schema": schema}}

    async def generate(request: Request) -> Response:
        return await handler.handle(request)

    app.add_api_route(
        path,
        generate,
        methods=["POST"],
        response_class=JsonResponse,
        openapi_extra={"requestBody": {"required": True, "content": content}},
    )


def _describe(app: FastAPI, bodies: list[type[BaseModel]]) -> None:
    """Add the schemas of request bodies to the OpenAPI document."""
    _, definitions = models_json_schema(
        [(body, "validation") for body in bodies], ref_template=_REFERENCE
    )
    make = app.openapi

    def openapi() -> dict[str, object]:
        document = make()
        document.setdefault("components", {}).setdefault("schemas", {}).update(definitions["$defs"])
        return document

    app.openapi = openapi


def _add_information(app: FastAPI, engine: Engine, settings: ServerSettings) -> None:
    created = datetime.fromtimestamp(settings.created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    # one object that OpenAI's and Anthropic's clients both read
    model = {
        "id": settings.model_name,
        "object": "model",
        "created": settings.created,
        "owned_by": "astrai",
        "type": "model",
        "display_name": settings.model_name,
        "created_at": created,
        "lifecycle": "active",
        "max_input_tokens": engine.max_context,
        "max_tokens": engine.max_context,
    }

    async def models() -> Response:
        name = settings.model_name
        page = {"has_more": False, "first_id": name, "last_id": name}
        return JsonResponse({"object": "list", "data": [model], **page})

    async def one_model(name: str) -> Response:
        check_model(name, settings.model_name)
        return JsonResponse(model)

    async def health() -> Response:
        if engine.healthy:
            return JsonResponse({"status": "ok"})
        return JsonResponse({"status": "the engine has stopped or hangs"}, status_code=503)

    app.add_api_route("/v1/models", models, methods=["GET"], response_class=JsonResponse)
    app.add_api_route(
        "/v1/models/{name:path}", one_model, methods=["GET"], response_class=JsonResponse
    )
    app.add_api_route("/health", health, methods=["GET"], response_class=JsonResponse)


def _about(settings: ServerSettings) -> dict[str, object]:
    places = {
        "chat": "/v1/chat/completions",
        "completions": "/v1/completions",
        "models": "/v1/models",
        "health": "/health",
        "openapi": "/openapi.json",
    }
    about = {"name": "AstrAI", "version": version("astrai"), "model": settings.model_name}
    return {**about, "endpoints": places}


def _add_errors(app: FastAPI) -> None:
    async def api_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error_response(error)

    async def validation(_: Request, error: Exception) -> Response:
        return error_response(InvalidRequestError(str(error)))

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path = f"{request.method} {request.url.path}"
        match error.status_code:
            case 404:
                return error_response(NotFoundError(f"there is nothing at {path}"))
            case 405:
                return error_response(MethodNotAllowedError(f"{path} is not to be had"))
            case _:
                return error_response(InvalidRequestError(error.detail))

    async def left(_: Request, __: Exception) -> Response:
        return Response(status_code=499)

    async def failure(_: Request, __: Exception) -> Response:
        return error_response(InternalError("the server failed; its log says why"))

    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(RequestValidationError, validation)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(ClientDisconnect, left)
    app.add_exception_handler(Exception, failure)
