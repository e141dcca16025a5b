"""`astrai-serve` as a process of its own, with a real model, spoken to by the official client."""

import contextlib
import json
import signal
import threading
import time
from typing import Any

import httpx2
import openai
import pytest
import torch

from astrai_core.model import AutoModel, ModelConfig
from astrai_core.tokenizer import AutoTokenizer

from .server_process import ServerProcess, write_model

HI: Any = [{"role": "user", "content": "你好"}]
ENDLESS = {"ignore_eos": True}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A random model whose next token is far from certain, so that seeds matter."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    shape = {"dim": 32, "n_layers": 2, "n_kv_heads": 2, "dim_ffn": 64, "max_len": 256}
    return write_model(folder, noise=0.1, **shape)


class Reader(threading.Thread):
    """Reads a stream to its end, as a client that knows nothing of the server's troubles."""

    def __init__(self, stream):
        super().__init__()
        self.started = threading.Event()
        self.chunks = []
        self.error = None
        self._stream = stream
        self.start()

    def run(self):
        try:
            for chunk in self._stream:
                self.chunks.append(chunk)
                if len(self.chunks) > 2:
                    self.started.set()
        except Exception as error:
            self.error = error
        self.started.set()


@pytest.fixture(scope="module")
def running(model_folder):
    with ServerProcess(model_folder, "--kv-cache-gb", 0.01) as process:
        yield process


@contextlib.contextmanager
def client_of(process):
    with openai.OpenAI(base_url=f"{process.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def test_the_report_says_what_this_server_is(running):
    parameters = 320 * 32 + 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64 + 2 * 32 + 2 * 8) + 32
    assert f"tiny, {parameters / 1000:.3g}k parameters, 2 layers, context 256 tokens" in (
        running.report
    )
    assert "float32 (the folder's own), 1 thread\n" in running.report
    assert "this machine only, without a key" in running.report
    assert f"astrai-chat --url {running.url}" in running.report


def test_greedy_tokens_are_those_of_the_full_forward(running, model_folder):
    model = AutoModel.from_pretrained(model_folder)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    prompt = tokenizer.encode("hello world, 你好")
    ids, logprobs = list(prompt), []
    for _ in range(12):
        with torch.no_grad():
            row = model(torch.tensor([ids]))["logits"][0, -1].log_softmax(-1)
        ids.append(int(row.argmax()))
        logprobs.append(float(row.max()))
    with client_of(running) as client:
        answer = client.completions.create(
            model="tiny",
            prompt=prompt,
            max_tokens=12,
            temperature=0,
            logprobs=0,
            extra_body=ENDLESS,
        )
    expected = b"".join(map(tokenizer.token_bytes, ids[len(prompt) :])).decode("utf-8", "replace")
    # of a character cut off at the end, the server says nothing
    assert answer.choices[0].text.rstrip("\ufffd") == expected.rstrip("\ufffd")
    told: Any = answer.choices[0].logprobs
    assert told.token_logprobs == pytest.approx(logprobs, abs=1e-4)


def test_a_seed_repeats_an_answer_whoever_else_is_there(running):
    def ask(client, **body):
        answer = client.chat.completions.create(
            model="tiny", messages=HI, max_tokens=20, extra_body=ENDLESS, **body
        )
        return [choice.message.content for choice in answer.choices]

    with client_of(running) as client:
        alone = ask(client, seed=5, n=2)
        assert alone[0] != alone[1]
        with client.chat.completions.create(
            model="tiny", messages=HI, stream=True, max_tokens=200, extra_body=ENDLESS
        ) as noise:
            next(iter(noise))
            assert ask(client, seed=5, n=2) == alone
        assert ask(client, seed=6, n=2) != alone


def test_what_is_streamed_is_what_is_answered_whole(running):
    wishes: Any = {"seed": 3, "max_tokens": 60, "extra_body": ENDLESS}
    with client_of(running) as client:
        whole: Any = client.chat.completions.create(model="tiny", messages=HI, **wishes)
        stream = client.chat.completions.create(
            model="tiny",
            messages=HI,
            stream=True,
            stream_options={"include_usage": True},
            **wishes,
        )
        chunks: list[Any] = list(stream)
    said = "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices)
    assert said == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 60


def test_an_idle_server_does_no_work(running):
    psutil = pytest.importorskip("psutil")
    process = psutil.Process(running.process.pid)
    # the last thing that it does by itself
    while not any(line.startswith("  speed ") for line in running.log):
        time.sleep(0.1)
    time.sleep(0.2)
    before = sum(process.cpu_times()[:2])
    time.sleep(1.0)
    assert sum(process.cpu_times()[:2]) - before <= 0.05


def test_ctrl_c_ends_it_at_once_with_a_stream_open(model_folder):
    with ServerProcess(model_folder) as process, client_of(process) as client:
        stream = client.chat.completions.create(
            model="tiny", messages=HI, stream=True, max_tokens=230, n=8, extra_body=ENDLESS
        )
        reader = Reader(stream)
        assert reader.started.wait(20)
        process.send(signal.SIGINT)
        began = time.monotonic()
        status, printed = process.wait()
        reader.join(20)
    assert time.monotonic() - began < 3
    assert (status, printed) == (0, "")
    assert isinstance(reader.error, openai.APIError)
    assert reader.error.code == "shutting_down"


def is_refused_soon(client):
    """Ask until the answer is a refused connection or a 503."""
    for _ in range(500):
        try:
            client.chat.completions.create(model="tiny", messages=HI, max_tokens=1)
        except openai.APIError:
            return True
    return False


def test_sigterm_lets_answers_end_and_takes_no_new_ones(model_folder):
    with ServerProcess(model_folder) as process, client_of(process) as client:
        stream = client.chat.completions.create(
            model="tiny", messages=HI, stream=True, max_tokens=60, n=4, extra_body=ENDLESS
        )
        reader = Reader(stream)
        assert reader.started.wait(20)
        process.send(signal.SIGTERM)
        assert is_refused_soon(client)
        status, printed = process.wait()
        reader.join(20)
    assert (status, printed, reader.error) == (0, "", None)
    ends = [c.finish_reason for chunk in reader.chunks for c in chunk.choices if c.finish_reason]
    assert ends == ["length"] * 4


def test_a_model_is_served_from_its_fields_alone(model_folder, tmp_path):
    fields = ModelConfig.load(model_folder).to_dict() | {"n_layers": 3, "norm_eps": 1e-5}
    del fields["model_type"]
    file = tmp_path / "plan.yaml"
    file.write_text("# a plan\n" + "\n".join(f"{k}: {json.dumps(v)}" for k, v in fields.items()))
    options = ("--tokenizer", model_folder, "--random-weights", "--dtype", "bfloat16")
    with ServerProcess(file, *options) as process:
        assert "plan, " in process.report
        assert "3 layers" in process.report
        assert "bfloat16 (as asked for)" in process.report
        body = {"messages": HI, "max_tokens": 3, "ignore_eos": True}
        answer = httpx2.post(f"{process.url}/v1/chat/completions", json=body, timeout=20).json()
        assert answer["usage"]["completion_tokens"] == 3
        assert answer["model"] == "plan"
        process.send(signal.SIGINT)
        assert process.wait()[0] == 0
