"""Live, ready, counted and named: what an operator's programs and clients' model menus ask."""

from datetime import UTC, datetime
from importlib.metadata import version

from fastapi import FastAPI
from starlette.responses import PlainTextResponse, Response

from astrai_serve.api import metrics
from astrai_serve.api.backend import Engine
from astrai_serve.api.openai_requests import check_model
from astrai_serve.api.openapi import answers
from astrai_serve.api.protocol import JsonResponse
from astrai_serve.api.response_models import Model, Models, Status, Version
from astrai_serve.api.settings import ServerSettings
from astrai_serve.api.shutdown import Shutdown

_SICK = "the engine has stopped or hangs"


def add_operation(
    app: FastAPI, engine: Engine, shutdown: Shutdown, rejected: metrics.Counter
) -> None:
    """Add `/health`, `/ready`, `/metrics` and `/version`."""

    async def health() -> Response:
        """Whether the process is to be left alone: steps come to an end."""
        return _status(None if engine.healthy else _SICK)

    async def ready() -> Response:
        """Whether to send requests here now."""
        if not engine.healthy:
            return _status(_SICK)
        if shutdown.draining:
            return _status("the server is shutting down")
        return _status("the queue is full" if engine.num_open >= engine.max_tasks else None)

    async def numbers() -> Response:
        """Counts and durations in Prometheus' text format."""
        text = metrics.render(engine, shutdown.num_cancelled, rejected)
        return Response(text, headers={"content-type": metrics.CONTENT_TYPE})

    async def about() -> Response:
        """The server's version."""
        return JsonResponse({"version": version("astrai")})

    sick = {503: {"model": Status, "description": "It is not."}}
    for path, route in (("/health", health), ("/ready", ready)):
        app.add_api_route(
            path,
            route,
            methods=["GET"],
            response_class=JsonResponse,
            responses=answers(path, Status) | sick,
        )
    app.add_api_route(
        "/version", about, methods=["GET"], response_class=JsonResponse,
        responses=answers("/version", Version),
    )  # fmt: skip
    app.add_api_route(
        "/metrics", numbers, methods=["GET"], response_class=PlainTextResponse,
        responses={s: told for s, told in answers("/metrics", Status).items() if s != 200},
    )  # fmt: skip


def add_models(app: FastAPI, engine: Engine, settings: ServerSettings) -> None:
    """Add `/v1/models`: objects that OpenAI's and Anthropic's clients both read."""
    created = datetime.fromtimestamp(settings.created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
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
        """The model, as a list."""
        name = settings.model_name
        page = {"has_more": False, "first_id": name, "last_id": name}
        return JsonResponse({"object": "list", "data": [model], **page})

    async def one_model(name: str) -> Response:
        """The model, if this is its name."""
        check_model(name, settings.model_name)
        return JsonResponse(model)

    app.add_api_route(
        "/v1/models", models, methods=["GET"], response_class=JsonResponse,
        responses=answers("/v1/models", Models),
    )  # fmt: skip
    app.add_api_route(
        "/v1/models/{name:path}", one_model, methods=["GET"], response_class=JsonResponse,
        responses=answers("/v1/models", Model, 404),
    )  # fmt: skip


def _status(trouble: str | None) -> Response:
    return JsonResponse({"status": trouble or "ok"}, status_code=503 if trouble else 200)
