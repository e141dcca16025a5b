"""`astrai-batch`: requests in, answers out, whenever it is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from astrai_core.generation import SamplingParams
from astrai_core.model import AutoModel, ModelConfig
from astrai_core.tokenizer import AutoTokenizer
from astrai_serve import LLM, InferenceEngine
from astrai_serve.api import ServerSettings
from astrai_serve.batch import MAX_LINE_BYTES, Answers, answer, main, read_lines
from astrai_serve.engine import EngineConfig

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
COMMAND = [sys.executable, "-c", "from astrai_serve.batch import main; main()"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=300, dim=16, n_layers=1, n_heads=2, dim_ffn=32, max_len=256)
    model = AutoModel.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    AutoModel.save_pretrained(model, folder)
    AutoTokenizer.train(["hello 你好"] * 9, 300).save_pretrained(folder)
    return folder


@pytest.fixture
def files(tmp_path):
    return SimpleNamespace(source=tmp_path / "in.jsonl", output=tmp_path / "out.jsonl")


def request(custom_id, url=TEXT, **body):
    body = {"prompt": f"hello {custom_id}", "max_tokens": 5, "temperature": 0} | body
    if url == CHAT:
        body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def write(file, lines):
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    file.write_text("".join(f"{text}\n" for text in texts), "utf-8")


def read(file):
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def run(folder, files, **config):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    engine = InferenceEngine(
        AutoModel.from_pretrained(folder), tokenizer, EngineConfig(num_pages=64, **config)
    )
    try:
        return answer(engine, ServerSettings(model_name="tiny"), files.source, files.output)
    finally:
        engine.close()


def test_answers_are_those_of_the_model(folder, files):
    lines = [request(f"r{n}", n=2 if n == 3 else 1) for n in range(7)]
    write(files.source, [*lines, request("chat", CHAT, model="tiny")])
    assert run(folder, files) == (8, 0)
    found = {one["custom_id"]: one["response"] for one in read(files.output)}
    llm = LLM(folder)
    wanted = llm.generate(
        [f"hello r{n}" for n in range(7)], SamplingParams(temperature=0, max_tokens=5)
    )
    for n, completion in enumerate(wanted):
        response = found[f"r{n}"]
        assert response["status_code"] == 200
        texts = [choice["text"] for choice in response["body"]["choices"]]
        assert texts == [completion.text] * (2 if n == 3 else 1)
    messages = [{"role": "user", "content": "hello chat"}]
    said = llm.chat(messages, SamplingParams(temperature=0, max_tokens=5)).text
    body = found["chat"]["body"]
    assert (body["object"], body["choices"][0]["message"]["content"]) == ("chat.completion", said)
    assert body["usage"]["completion_tokens"] <= 5


BAD = [
    ("{", "line 1: not JSON"),
    ("[" * 10**5, "line 1: not JSON"),
    ("[1]", "line 1: not a JSON object"),
    ({"method": "POST"}, "line 1: custom_id"),
    (request("x") | {"method": "GET"}, "line 1: method must be POST, not 'GET'"),
    (request("x") | {"url": "/v1/embeddings"}, "line 1: url must be /v1/chat"),
    (request("x") | {"body": 3}, "line 1: body must be a JSON object, not 3"),
    (request("x", stream=True), "line 1: body.stream"),
    ("x" * (MAX_LINE_BYTES + 9), "line 1: longer than"),
]


@pytest.mark.parametrize(("line", "message"), BAD, ids=[message for _, message in BAD])
def test_a_bad_line_is_told_of_by_its_number(files, line, message):
    write(files.source, [line, "", request("good")])
    bad, good = read_lines(files.source, [CHAT, TEXT])
    assert bad.error is not None
    assert f"line {bad.number}: {bad.error}".startswith(message)
    assert (good.number, good.custom_id, good.error) == (3, "good", None)


def test_bad_lines_and_bad_bodies_are_answered_once(folder, files):
    bodies = [request("cold", temperature=9), request("other", model="gpt"), request("a")]
    write(files.source, ["{", *bodies, request("a", max_tokens=2)])
    assert run(folder, files) == (5, 4)
    assert run(folder, files) == (5, 4), "nothing is done twice"
    answers = read(files.output)
    of_lines = [one["error"] for one in answers if one["response"] is None]
    assert {one["line"]: one["message"] for one in of_lines} == {
        1: of_lines[0]["message"],
        5: "line 5: custom_id 'a' is that of line 4, too",
    }
    found = {one["custom_id"]: one["response"] for one in answers if one["response"]}
    assert {name: one["status_code"] for name, one in found.items()} == {
        "cold": 400, "other": 404, "a": 200
    }  # fmt: skip
    assert found["cold"]["body"]["error"]["param"] == "temperature"


def test_a_run_goes_on_behind_a_half_written_line(folder, files):
    write(files.source, [request(f"r{n}") for n in range(6)])
    run(folder, files)
    whole = files.output.read_bytes()
    lines = whole.splitlines(keepends=True)
    files.output.write_bytes(b"".join(lines[:3]) + lines[3][:40])
    assert run(folder, files) == (6, 0)
    assert files.output.read_bytes().startswith(b"".join(lines[:3]))
    assert sorted(one["custom_id"] for one in read(files.output)) == [f"r{n}" for n in range(6)]


def test_more_choices_than_the_queue_holds(folder, files):
    many = [request(f"r{n}", n=3) for n in range(9)]
    write(files.source, [*many, request("never", n=4)])
    assert run(folder, files, max_running_tasks=2, max_queued_tasks=1) == (10, 1)
    found = {one["custom_id"]: one["response"] for one in read(files.output)}
    assert found["never"]["body"]["error"]["code"] == "queue_full"


def test_what_is_no_file_of_answers_is_left_alone(tmp_path):
    file = tmp_path / "out.jsonl"
    file.write_text('{"custom_id": "mine"}\nmore\n')
    with pytest.raises(ValueError, match=r"out\.jsonl has no answer in line 1; name another"):
        Answers(file)
    assert file.read_text() == '{"custom_id": "mine"}\nmore\n'


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({"--input": None}, 2, ["--input is required"]),
        ({"--input": "nowhere.jsonl"}, 1, ["nowhere.jsonl is not a file"]),
        ({"--output": "no/folder/out.jsonl"}, 1, ["no folder no/folder"]),
        ({"--output": "in.jsonl", "--input": "in.jsonl"}, 2, ["--input and --output"]),
        ({"--model": "nothing"}, 1, ["--model nothing does not exist"]),
        ({"--weights": "int3"}, 2, ["--weights", "w8a8"]),
    ],
)
def test_a_wrong_option_is_one_line(folder, files, capsys, changes, status, words):
    write(files.source, [])
    options = {"--model": folder, "--input": files.source, "--output": files.output} | changes
    arguments = [str(part) for pair in options.items() if pair[1] is not None for part in pair]
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert caught.value.code == status
    assert all(word in line for word in words), line


@pytest.mark.parametrize("kills", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_killed_again_and_again_no_answer_is_lost_or_repeated(folder, files, kills):
    names = [f"r{n}" for n in range(12 * (kills + 1))]
    write(files.source, [request(name, max_tokens=30, ignore_eos=True) for name in names])
    arguments = ["--model", folder, "--input", files.source, "--output", files.output]
    command = [*COMMAND, *map(str, arguments), "--max-running-tasks", "4"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    kept = b""
    for _ in range(kills):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment)
        while process.poll() is None:
            written = files.output.read_bytes() if files.output.exists() else b""
            if written.count(b"\n") > kept.count(b"\n") + 3:
                break
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it was done too soon"
        written = files.output.read_bytes()
        assert written.startswith(kept)
        kept = written[: written.rindex(b"\n") + 1]
        files.output.write_bytes(written + b'{"id": "batch_r')
    assert run(folder, files) == (len(names), 0)
    assert files.output.read_bytes().startswith(kept)
    assert sorted(one["custom_id"] for one in read(files.output)) == sorted(names)
