import json
import os
import re
import signal
import subprocess
import sysconfig
from http.client import HTTPConnection
from pathlib import Path
from threading import Thread

import pytest

from astrai_train.report.history import History
from astrai_train.report.watch import WatchedRun, WatchServer

HEADER = "epoch,step,train/loss\n"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.yaml").write_text("trainer: {max_steps: 100}\n")
    return tmp_path


class Clock:
    def __init__(self):
        self.now = 1_000_000.0

    def __call__(self):
        return self.now


def write(folder, steps, clock):
    metrics = folder / "metrics.csv"
    metrics.write_text(HEADER + "".join(f"0,{step - 1},{1 / step}\n" for step in steps))
    os.utime(metrics, (clock.now, clock.now))


def test_it_tells_how_far_and_how_long(folder):
    clock = Clock()
    run = WatchedRun(folder, clock)
    first = run.state()
    assert (first["share"], first["text"]) == (0.0, "no step is logged yet")
    assert "Nothing was logged yet" in first["report"]

    write(folder, [10, 20], clock)
    clock.now += 1  # the step was done a second ago
    state = run.state(first["version"])
    assert (state["share"], "train/loss" in state["report"]) == (0.2, True)
    assert "report" not in run.state(state["version"])

    # 10 steps in 40 seconds, and 5 seconds since: when the watching began does not count
    clock.now += 39
    write(folder, [10, 20, 30], clock)
    run.state()
    clock.now += 5
    text = run.state()["text"]
    found = re.fullmatch(r"step 30 of 100, about (?:(\d+) min )?(\d+) s left", text)
    assert found is not None
    minutes, seconds = found.groups()
    assert int(minutes or 0) * 60 + int(seconds) == pytest.approx(70 * 40 / 10 - 5, abs=1)

    clock.now += 600
    assert "nothing new for 10 min" in run.state()["text"]
    (folder / "finished.json").write_text("{}")
    state = run.state()
    assert (state["share"], state["text"]) == (1.0, "finished after 30 steps")


def test_a_file_that_is_half_written_leaves_the_page_as_it_was(folder):
    clock = Clock()
    run = WatchedRun(folder, clock)
    write(folder, [10], clock)
    good = run.state()
    (folder / "metrics.csv").write_text(HEADER + "0,9,1\n0,19,ha\n")
    state = run.state(good["version"])
    assert state["version"] == good["version"]
    assert "holds 'ha' where a number should be" in state["text"]


def test_a_run_begun_anew_starts_its_clock_anew(folder):
    clock = Clock()
    run = WatchedRun(folder, clock)
    write(folder, [50], clock)
    run.state()
    clock.now += 60
    write(folder, [10], clock)
    assert run.state()["text"] == "step 10 of 100"


def test_a_line_that_comes_while_the_file_is_read_is_no_step_s_moment(folder, monkeypatch):
    clock = Clock()
    run = WatchedRun(folder, clock)
    write(folder, [10], clock)
    read = History.of

    def slowly(path):
        history = read(path)
        clock.now += 40
        write(folder, [10, 20], clock)
        return history

    monkeypatch.setattr(History, "of", slowly)
    run.state()
    monkeypatch.setattr(History, "of", read)
    run.state()
    clock.now += 40
    write(folder, [10, 20, 30], clock)
    assert run.state()["text"] == "step 30 of 100, about 4 min 40 s left"


def test_a_run_of_long_steps_is_not_taken_for_a_stopped_one(folder):
    clock = Clock()
    run = WatchedRun(folder, clock)
    for step in (1, 2):
        write(folder, [step], clock)
        run.state()
        clock.now += 300
    assert run.state()["text"] == "step 2 of 100, about 8 h 05 min left"
    clock.now += 601
    assert "nothing new for 15 min" in run.state()["text"]


@pytest.fixture
def server(folder):
    server = WatchServer(WatchedRun(folder))
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def get(server, path, host=None):
    connection = HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.request("GET", path, headers={"Host": host} if host else {})
    response = connection.getresponse()
    body = response.read().decode()
    connection.close()
    return response, body


def test_the_page_runs_its_own_script_and_no_other(server, folder):
    samples = '{"step": 1, "prompt": "p", "text": "<img src=x onerror=alert(1)>"}\n'
    (folder / "samples.jsonl").write_text(samples)
    response, page = get(server, "/")
    assert (response.status, 'src="/watch.js"' in page) == (200, True)
    policy = response.getheader("content-security-policy") or ""
    assert "script-src 'self'" in policy
    assert "text/javascript" in (get(server, "/watch.js")[0].getheader("content-type") or "")
    state = json.loads(get(server, "/state")[1])
    assert "&lt;img src=x" in state["report"]
    assert "<img" not in state["report"]
    assert "report" not in json.loads(get(server, f"/state?{state['version']}")[1])


def test_other_names_and_places_are_refused(server):
    assert get(server, "/state", host="evil.example")[0].status == 403
    assert get(server, "/state", host=f"localhost:{server.server_port}")[0].status == 200
    assert get(server, "/../config.yaml")[0].status == 404


def test_the_command_serves_until_ctrl_c(folder):
    program = Path(sysconfig.get_path("scripts")) / "astrai-train"
    process = subprocess.Popen(
        [program, "watch", folder],
        stdout=subprocess.PIPE,
        text=True,
        # a background shell hands its children an ignored Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.search(r"http://127.0.0.1:(\d+)", line)
    assert found is not None
    connection = HTTPConnection("127.0.0.1", int(found[1]), timeout=30)
    connection.request("GET", "/state")
    assert json.loads(connection.getresponse().read())["share"] == 0.0
    connection.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    process.stdout.close()
