"""The HTTP interface."""

from astrai_serve.api.app import create_app
from astrai_serve.api.server import bind, run_server
from astrai_serve.api.settings import ServerSettings

__all__ = ["ServerSettings", "bind", "create_app", "run_server"]
