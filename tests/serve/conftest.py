"""A live server whose model recites a script: the real engine, the real socket, no arithmetic."""

import json
import threading
from collections.abc import Sequence

import httpx2
import pytest
import uvicorn

from astrai_core.generation import SamplingParams
from astrai_core.tokenizer import AutoTokenizer
from astrai_serve.api import ServerSettings, bind, create_app
from astrai_serve.api.shutdown import Shutdown
from astrai_serve.engine import EngineConfig, InferenceEngine, TokenLogprob
from astrai_serve.engine.core import EngineCore
from astrai_serve.engine.kv_cache import KVCache
from astrai_serve.engine.scheduler import Chunk, InferenceScheduler
from astrai_serve.engine.task import SampledToken, Task

TEXTS = [
    "你好，世界！今天天气很好。",
    "hello world, the weather is fine today",
    "emoji 😀👩‍👩‍👧 北京",
]
CONTEXT = 512


class Script:
    """Says `answer` to every task, then ends its turn."""

    def __init__(self, tokenizer: AutoTokenizer):
        self.tokenizer = tokenizer
        self.answer = "hello"
        self.go = threading.Event()
        """Cleared, it holds every step back, as a long prefill would."""
        self.go.set()
        self.hold_at = 0
        """Steps are held back only once a task in them has said so many tokens."""
        self.tasks: list[Task] = []

    def execute(self, chunks: Sequence[Chunk]) -> list[list[SampledToken]]:
        """Recite."""
        if any(chunk.task.num_output_tokens >= self.hold_at for chunk in chunks):
            assert self.go.wait(20), "a test holds the engine back and does not let it go"
        if self.answer == "crash":
            raise RuntimeError("the script broke")
        return [[self._sample(chunk.task)] if chunk.samples else [] for chunk in chunks]

    def _sample(self, task: Task) -> SampledToken:
        if task not in self.tasks:
            self.tasks.append(task)
        ids = self.tokenizer.encode(self.answer)
        position = task.num_output_tokens
        token_id = ids[position] if position < len(ids) else self.tokenizer.eos_id
        assert token_id is not None
        if task.params.ignore_eos and position >= len(ids):
            token_id = ids[position % len(ids)]
        if task.params.logprobs is None:
            return SampledToken(token_id=token_id)
        top = tuple((other, -0.5 - other) for other in range(task.params.logprobs))
        return SampledToken(
            token_id=token_id, logprob=TokenLogprob(token_id=token_id, logprob=-0.25, top=top)
        )


class ScriptCore(EngineCore):
    """Takes every form and holds the script to none."""

    def matcher_of(self, params: SamplingParams) -> None:
        """No matcher, whatever the form."""


class Server:
    """The application on a port of its own."""

    def __init__(self, engine_config=None, **settings):
        self.tokenizer = AutoTokenizer.train(TEXTS * 20, 320)
        self.script = Script(self.tokenizer)
        engine_config = engine_config or EngineConfig(max_running_tasks=8, max_queued_tasks=8)
        scheduler = InferenceScheduler(
            KVCache(64, 16),
            max_running_tasks=engine_config.max_running_tasks,
            max_step_tokens=64,
        )
        core = ScriptCore(
            scheduler,
            self.script,
            vocab_size=self.tokenizer.vocab_size,
            max_context=CONTEXT,
            model_stop_ids=self.tokenizer.stop_ids,
            token_bytes=self.tokenizer.token_bytes,
        )
        self.engine = InferenceEngine(None, self.tokenizer, engine_config, core=core)
        self.shutdown = Shutdown()
        self.settings = ServerSettings(**({"model_name": "tiny", "ping_seconds": 0.1} | settings))
        app = create_app(self.engine, self.settings, self.shutdown)
        listener = bind("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        config = uvicorn.Config(app, log_config=None, ws="none", timeout_graceful_shutdown=3)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([listener],))
        self.http = httpx2.Client(base_url=self.url, timeout=20)

    def __enter__(self):
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
            threading.Event().wait(0.005)
        return self

    def __exit__(self, *_):
        self.script.go.set()
        self.http.close()
        self._server.should_exit = True
        self._thread.join()

    def say(self, answer):
        """Let every task answer this."""
        self.script.answer = answer
        self.script.hold_at = 0
        self.script.tasks.clear()

    def chat(self, content="hi", **body):
        """POST a chat of one message."""
        messages = [{"role": "user", "content": content}]
        return self.http.post("/v1/chat/completions", json={"messages": messages} | body)

    def complete(self, prompt="hi", **body):
        """POST a text completion."""
        return self.http.post("/v1/completions", json={"prompt": prompt} | body)

    def hold(self, at=0):
        """Let no step be computed, or none once a task has said so many tokens."""
        self.script.hold_at = at
        self.script.go.clear()

    def wait(self, condition):
        """Wait until something is true."""
        for _ in range(500):
            if condition():
                return
            threading.Event().wait(0.01)
        raise AssertionError("it does not happen")

    def wait_cancelled(self):
        """Wait until no request is left open, and let the engine go on."""
        self.wait(lambda: self.shutdown.num_open == 0)
        self.script.go.set()
        self.wait_idle()

    def wait_idle(self):
        """Wait until no task is left."""
        self.wait(lambda: self.engine.stats()["num_open"] == self.shutdown.num_open == 0)

    @staticmethod
    def chunks(response):
        """The objects of a stream, without its end mark."""
        events = response.text.split("\n\n")
        data = [event.removeprefix("data: ") for event in events if event.startswith("data: ")]
        assert data.pop() == "[DONE]"
        return [json.loads(one) for one in data]


@pytest.fixture(scope="package")
def live():
    """A server shared by all tests of the interface."""
    with Server() as server:
        yield server


@pytest.fixture
def server(live):
    """The shared server, reciting "hello"."""
    live.wait_idle()
    live.say("hello")
    yield live
    live.script.go.set()


@pytest.fixture(scope="session")
def start_server():
    """Start a server with settings of one's own."""
    return Server
