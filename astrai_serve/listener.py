"""The port of a server, taken before anything is imported or read that takes time."""

import errno
import socket


def bind(host: str, port: int) -> socket.socket:
    """Take a port, before anything slow is done; nobody can connect until the server runs.

    Raises:
        ValueError: the address is in use or not of this machine.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ValueError(f"host {host} cannot be resolved: {error}") from None
    # for a name with both, as localhost: more clients try IPv4
    family, kind, protocol, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, OverflowError) as error:
        listener.close()
        raise ValueError(_no_port(host, port, error)) from None
    return listener


def _no_port(host: str, port: int, error: Exception) -> str:
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        return f"port {port} on {host} is in use; stop what uses it or choose another --port"
    return f"cannot listen on {host} port {port}: {error}"
