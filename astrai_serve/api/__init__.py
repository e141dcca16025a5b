"""The HTTP interface."""

from astrai_serve.api.app import create_app
from astrai_serve.api.server import run_server
from astrai_serve.api.settings import ServerSettings
from astrai_serve.listener import bind

__all__ = ["ServerSettings", "bind", "create_app", "run_server"]
