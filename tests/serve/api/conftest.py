"""The official client, on the shared live server."""

import openai
import pytest


@pytest.fixture(scope="package")
def live_client(live):
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture
def client(server, live_client):
    """OpenAI's own client; the server recites "hello" until it is told otherwise."""
    return live_client
