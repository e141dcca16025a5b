"""The server process in an operator's hands: signals, certificates, the log, a forced call."""

import json
import signal
import ssl
import subprocess
import time

import anthropic
import httpx2
import pytest

from .server_process import ServerProcess, write_model
from .test_serve import ENDLESS, HI, Reader, client_of


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return write_model(folder, dim=32, n_layers=1, dim_ffn=64, max_len=1024)


TOOL = {
    "name": "weather",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"enum": ["北京", "上海"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


def test_a_second_signal_ends_a_drain(model_folder):
    with (
        ServerProcess(model_folder, "--drain-seconds", 600) as process,
        client_of(process) as client,
    ):
        stream = client.chat.completions.create(
            model="tiny", messages=HI, stream=True, max_tokens=230, n=32, extra_body=ENDLESS
        )
        reader = Reader(stream)
        assert reader.started.wait(60)
        process.send(signal.SIGTERM)
        assert reader.is_alive()
        time.sleep(0.05)
        process.send(signal.SIGTERM)
        status, printed = process.wait(60)
        reader.join(60)
    assert (status, printed) == (0, "")


def test_a_forced_call_and_a_log_of_objects_over_https(model_folder, tmp_path):
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-keyout", key,
         "-out", certificate, "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"],
        capture_output=True, check=False,
    )  # fmt: skip
    if made.returncode:
        pytest.skip("openssl is not here to make a certificate")
    tls = ("--tls-certificate", certificate, "--tls-key", key, "--host", "localhost")
    options = ("--access-log", "true", "--log-format", "json")
    with ServerProcess(model_folder, *options, *tls) as process:
        assert process.url.startswith("https://localhost:")
        trust = ssl.create_default_context(cafile=str(certificate))
        http = anthropic.DefaultHttpxClient(verify=trust)
        with anthropic.Anthropic(base_url=process.url, api_key="k", http_client=http) as client:
            answer = client.messages.create(
                model="tiny",
                max_tokens=120,
                messages=[{"role": "user", "content": "你好"}],
                tools=[TOOL],  # type: ignore[list-item]
                tool_choice={"type": "any", "disable_parallel_tool_use": True},
            )
        with pytest.raises(httpx2.ConnectError):
            httpx2.get(f"{process.url}/health")  # whose certificate nobody vouches for
        process.send(signal.SIGINT)
        status, printed = process.wait(60)
    (call,) = answer.content
    assert call.type == "tool_use"
    assert (call.name, answer.stop_reason) == ("weather", "tool_use")
    assert call.input in ({"city": "北京"}, {"city": "上海"})
    assert status == 0
    told = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    (line,) = [one for one in told if one.get("path") == "/v1/messages"]
    assert (line["status"], line["output_tokens"]) == (200, answer.usage.output_tokens)
    assert "你好" not in printed
