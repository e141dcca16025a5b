"""The official client on the shared live server, and a server of a real small model."""

import threading

import openai
import pytest
import torch
import uvicorn

from astrai_core.model import ModelConfig, Transformer
from astrai_core.tokenizer import AutoTokenizer
from astrai_serve.api import ServerSettings, bind, create_app
from astrai_serve.engine import EngineConfig, InferenceEngine

TINY_TEXTS = ["你好，世界！今天北京天气很好。", '{"name": "hello world", "age": 12}']


@pytest.fixture(scope="package")
def live_client(live):
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture
def client(server, live_client):
    """OpenAI's own client; the server recites "hello" until it is told otherwise."""
    return live_client


@pytest.fixture(scope="package")
def tiny_tokenizer():
    return AutoTokenizer.train(TINY_TEXTS * 20, 290)


@pytest.fixture(scope="package")
def tiny_model(tiny_tokenizer):
    torch.manual_seed(0)
    vocab_size = tiny_tokenizer.vocab_size
    shape = ModelConfig(
        vocab_size=vocab_size, dim=32, n_layers=1, dim_ffn=48, n_heads=4, max_len=1024
    )
    return Transformer(shape).eval()


@pytest.fixture(scope="package")
def tiny_url(tiny_model, tiny_tokenizer):
    """Address of a server whose model is random and computes 9 tokens a step."""
    config = EngineConfig(
        page_size=4, num_pages=256, max_step_tokens=9, max_running_tasks=4, max_queued_tasks=8
    )
    engine = InferenceEngine(tiny_model, tiny_tokenizer, config)
    listener = bind("127.0.0.1", 0)
    app = create_app(engine, ServerSettings(model_name="tiny"))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, ws="none"))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join()
