"""API keys: who may ask, and whose cached prefixes they share."""

import hashlib
import hmac

from starlette.datastructures import Headers

from astrai_serve.api.errors import AuthenticationError


def presented_key(headers: Headers) -> str | None:
    """Return the key a request carries, as OpenAI's or as Anthropic's clients send it."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        return key.strip()
    return headers.get("x-api-key")


def check_key(headers: Headers, keys: frozenset[str]) -> None:
    """Let pass who carries one of `keys`; without keys, everyone.

    Raises:
        AuthenticationError: no key, or a wrong one.
    """
    if not keys:
        return
    presented = presented_key(headers)
    if presented is None:
        raise AuthenticationError("this server asks for an API key: Authorization: Bearer KEY")
    # every key is compared, in constant time, so that timing tells nothing
    digest = hashlib.sha256(presented.encode()).digest()
    known = [hmac.compare_digest(digest, hashlib.sha256(key.encode()).digest()) for key in keys]
    if not any(known):
        raise AuthenticationError("the API key is not one of this server's")


def client_of(headers: Headers, keys: frozenset[str]) -> str:
    """Return a name for who asks, from which the key cannot be told; "" where there are no keys."""
    key = presented_key(headers) if keys else None
    return hashlib.sha256(f"client:{key}".encode()).hexdigest()[:12] if key else ""


def cache_salt(headers: Headers, keys: frozenset[str], requested: str | None) -> str:
    """Return what sets this client's cached prefixes apart from those of other keys."""
    key = presented_key(headers) or "" if keys else ""
    if not key and not requested:
        return ""
    return hashlib.sha256(f"{len(key)}:{key}{requested or ''}".encode()).hexdigest()
