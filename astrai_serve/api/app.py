"""The web application: which address leads where."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version

import anyio
import anyio.to_thread
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Scope

from astrai_serve.api.anthropic import MessagesHandler
from astrai_serve.api.anthropic_requests import MessagesRequest
from astrai_serve.api.backend import Engine
from astrai_serve.api.envelopes import error_response
from astrai_serve.api.errors import (
    ApiError,
    InternalError,
    InvalidRequestError,
    MethodNotAllowedError,
    NotFoundError,
)
from astrai_serve.api.guards import Guard, RequestIds
from astrai_serve.api.metrics import Counter
from astrai_serve.api.openai_chat import ChatHandler
from astrai_serve.api.openai_completions import CompletionHandler
from astrai_serve.api.openai_requests import ChatCompletionRequest, CompletionRequest
from astrai_serve.api.openapi import answers, body_of, describe
from astrai_serve.api.operation_routes import add_models, add_operation
from astrai_serve.api.page import add_page
from astrai_serve.api.protocol import JsonResponse, ProtocolHandler
from astrai_serve.api.request_log import RequestLog
from astrai_serve.api.response_models import ChatCompletion, Completion, Message, ResponseAnswer
from astrai_serve.api.responses import ResponsesHandler
from astrai_serve.api.responses_requests import ResponseRequest
from astrai_serve.api.settings import ServerSettings
from astrai_serve.api.shutdown import Shutdown
from astrai_serve.api.text_routes import BODIES, TextRoutes

_CLOSE_SECONDS = 2.0


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
    shutdown.max_seconds = settings.max_seconds
    rejected = Counter()

    def refuse(error: ApiError, scope: Scope) -> Response:
        rejected.add(error.code or error.type)
        return error_response(error, scope)

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
    _add_generation(app, "/v1/chat/completions", chat, ChatCompletionRequest, ChatCompletion)
    _add_generation(app, "/v1/completions", completion, CompletionRequest, Completion)
    messages = MessagesHandler(engine, tokenizer, settings, shutdown, limiter)
    _add_generation(app, "/v1/messages", messages, MessagesRequest, Message)
    responses = ResponsesHandler(engine, tokenizer, settings, shutdown, limiter)
    _add_generation(app, "/v1/responses", responses, ResponseRequest, ResponseAnswer)
    add_models(app, engine, settings)
    TextRoutes(engine, tokenizer, settings, limiter).add_to(app)
    add_operation(app, engine, shutdown, rejected)
    add_page(app, _about(settings))
    bodies = [ChatCompletionRequest, CompletionRequest, MessagesRequest, ResponseRequest, *BODIES]
    describe(app, bodies, settings)
    _add_errors(app, refuse)
    # the last one added is the first one asked
    app.add_middleware(Guard, settings=settings, refuse=refuse)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "request-id", "retry-after"],
        )
    if settings.log_requests:
        app.add_middleware(RequestLog, settings=settings)
    app.add_middleware(RequestIds)
    return app


def _add_generation(
    app: FastAPI,
    path: str,
    handler: ProtocolHandler,
    body: type[BaseModel],
    answer: type[BaseModel],
) -> None:
    """Route a path to a handler, which reads the body itself; the schemas are for readers."""

    async def generate(request: Request) -> Response:
        return await handler.handle(request)

    app.add_api_route(
        path,
        generate,
        methods=["POST"],
        name=path,
        description=handler.__doc__,
        response_class=JsonResponse,
        openapi_extra=body_of(body),
        responses=answers(path, answer, is_posted=True, generates=True),
    )


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


def _add_errors(app: FastAPI, refuse: Callable[[ApiError, Scope], Response]) -> None:
    async def api_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return refuse(error, request.scope)

    async def validation(request: Request, error: Exception) -> Response:
        return refuse(InvalidRequestError(str(error)), request.scope)

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path = f"{request.method} {request.url.path}"
        match error.status_code:
            case 404:
                answer = NotFoundError(f"there is nothing at {path}")
            case 405:
                answer = MethodNotAllowedError(f"{path} is not to be had", allow=error.headers)
            case _:
                answer = InvalidRequestError(error.detail)
        return refuse(answer, request.scope)

    async def left(_: Request, __: Exception) -> Response:
        return Response(status_code=499)

    async def failure(request: Request, _: Exception) -> Response:
        return refuse(InternalError("the server failed; its log says why"), request.scope)

    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(RequestValidationError, validation)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(ClientDisconnect, left)
    app.add_exception_handler(Exception, failure)
