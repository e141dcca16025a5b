"""The chat page: static files beside this module, and the headers that bind a browser to them.

The page is an ordinary client of the API. Whatever a model writes, the policy lets no other script
run, nothing be fetched from elsewhere, and no text be turned into markup.
"""

from collections.abc import Mapping
from pathlib import Path

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import FileResponse, Response

from astrai_serve.api.errors import NotFoundError
from astrai_serve.api.protocol import JsonResponse

_WEB = Path(__file__).parent / "web"
_PAGE = "index.html"
_MEDIA_TYPES = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
_ASSETS = {
    path.name: _MEDIA_TYPES[path.suffix]
    for path in _WEB.iterdir()
    if path.suffix in _MEDIA_TYPES and path.is_file()
}
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def add_page(app: FastAPI, about: Mapping[str, object]) -> None:
    """Route `/` to the page for browsers and to `about` for programs, and `/web/` to its files."""

    async def root(request: Request) -> Response:
        if "text/html" in request.headers.get("accept", ""):
            return FileResponse(_WEB / _PAGE, headers={**_HEADERS, "vary": "accept"})
        return JsonResponse(about, headers={"vary": "accept"})

    async def asset(name: str) -> Response:
        if name not in _ASSETS:
            raise NotFoundError(f"there is nothing at /web/{name}")
        return FileResponse(_WEB / name, media_type=_ASSETS[name], headers=_HEADERS)

    app.add_api_route("/", root, methods=["GET"], include_in_schema=False)
    app.add_api_route("/web/{name}", asset, methods=["GET"], include_in_schema=False)
