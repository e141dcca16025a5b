"""What strangers may send: a clear answer to each, never a failure, a healthy server after it."""

import json
import socket
from typing import Any
from urllib.parse import urlsplit

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

JSON = {"content-type": "application/json"}
POSTS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/tokenize",
    "/detokenize",
    "/render",
)
HI: Any = [{"role": "user", "content": "hi"}]
BODIES: dict[str, Any] = {
    "/v1/chat/completions": {"messages": HI, "max_tokens": 3},
    "/v1/completions": {"prompt": "hi", "max_tokens": 3},
    "/v1/messages": {"messages": HI, "max_tokens": 3},
    "/v1/messages/count_tokens": {"messages": HI},
    "/tokenize": {"prompt": "hi"},
    "/detokenize": {"tokens": [5]},
    "/render": {"messages": HI},
}
QUIET = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.filter_too_much,
        HealthCheck.large_base_example,
        HealthCheck.function_scoped_fixture,
    ],
    database=None,
)


def check(server, path, content):
    """Send a body and look at the answer; return its status."""
    response = server.http.post(path, content=content, headers=JSON)
    assert response.status_code < 500, (path, content[:200], response.text)
    if response.status_code != 200:
        error = response.json()["error"]
        assert error["message"]
        assert "\n" not in error["message"]
    return response.status_code


def check_healthy(server):
    """It still answers, and nothing is left of what came before."""
    server.wait_idle()
    server.say("hello")
    assert server.http.get("/health").status_code == 200
    assert server.chat().json()["choices"][0]["message"]["content"] == "hello"
    server.wait_idle()
    assert server.engine.stats()["kv_cache_usage"] == 0


@pytest.mark.parametrize("path", POSTS)
def test_broken_bodies_are_refused(server, path):
    whole = json.dumps(BODIES[path]).encode()
    broken = [whole[:cut] for cut in range(len(whole))]
    broken += [b"\xff\xfe" + whole, whole.replace(b"hi", b"\xc3\x28"), whole + b"}", b"null", b"0"]
    broken += [b"[" * 100_000, b'{"a":' * 100_000, b'{"messages":' + b"[" * 50_000 + b"]" * 50_000]
    for body in broken:
        if body != whole.replace(b"hi", b"\xc3\x28") or b"hi" in whole:
            assert check(server, path, body) == 400, body[:80]
    check_healthy(server)


@pytest.mark.parametrize("path", POSTS)
def test_half_of_a_surrogate_pair_is_refused(server, path):
    for half in ("\\ud83d", "\\ude00", "a\\ud83d\\ud83d"):
        body = json.dumps(BODIES[path]).replace("hi", half)
        if half in body:
            assert check(server, path, body.encode()) == 400
    check_healthy(server)


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([10**400, -(2**64), 2**63, 1e308, -1e308, 0, -1, 1.5]),
    st.text(max_size=9),
    st.sampled_from(["<|im_end|>", "<|im_start|>system\n", "\x00", "‮", "{{ 7*7 }}", "a" * 5000]),
    st.lists(st.integers(-2, 2), max_size=3),
    st.recursive(st.none(), lambda inner: st.dictionaries(st.text(max_size=3), inner, max_size=2)),
)


@pytest.mark.parametrize("path", POSTS)
def test_values_of_every_wrong_kind_are_answered(server, path):
    schema = server.http.get("/openapi.json").json()
    reference = schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    name = reference["schema"]["$ref"].rpartition("/")[2]
    known = sorted(schema["components"]["schemas"][name]["properties"])

    @QUIET
    @given(st.dictionaries(st.sampled_from(known), ODD, max_size=3))
    def odd(wrong):
        check(server, path, json.dumps(BODIES[path] | wrong).encode())

    odd()
    check_healthy(server)


@pytest.mark.parametrize(
    "text", ["<|im_end|>", "<|im_start|>system", "<|endoftext|>", "\x00\u2028"]
)
def test_control_tokens_in_text_stay_text(server, text):
    sly: Any = [{"role": "user", "content": f"{text}\n{text}"}]
    for path in ("/v1/chat/completions", "/v1/messages"):
        server.say("hello")
        assert server.http.post(path, json={"messages": sly, "max_tokens": 9}).status_code == 200
        prompt = server.script.tasks[0].prompt_ids
        assert sum(i in server.tokenizer.control_ids for i in prompt) == 3
    check_healthy(server)


HOSTILE_FORMS = [
    {"type": "json_schema", "json_schema": {"schema": schema}}
    for schema in (
        {"$ref": "#"},
        {"$ref": "http://127.0.0.1:1/x"},
        {"allOf": [{"$ref": "#/allOf/0"}]},
        {"type": "string", "pattern": "(a+)+$" * 300},
        {"type": "string", "pattern": "(?=a)\\1"},
        {"type": "string", "minLength": 10**9},
        {"type": "array", "minItems": 10**9, "items": {}},
        {"enum": []},
        {"properties": {str(n): {"type": "string"} for n in range(3000)}},
    )
]


def test_hostile_forms_are_refused_or_kept_but_never_break_it(server):
    for form in HOSTILE_FORMS:
        body = {"messages": HI, "max_tokens": 3, "response_format": form}
        check(server, "/v1/chat/completions", json.dumps(body).encode())
    for regex in ("(a*)*" * 500, "[", "a{1000000000}", "\\p{Han}{99999}", "(?R)"):
        body = {"messages": HI, "max_tokens": 3, "structured_outputs": {"regex": regex}}
        check(server, "/v1/chat/completions", json.dumps(body).encode())
    check_healthy(server)


def test_connections_that_break_off_anywhere_leave_nothing(server):
    address = urlsplit(server.url)
    body = json.dumps({"messages": HI, "stream": True, "max_tokens": 50}).encode()
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"
        b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
    )
    server.say("hello " * 30)
    whole = head + body
    for cut in [*range(1, len(whole), 23), len(whole)]:
        with socket.create_connection((address.hostname, address.port), timeout=5) as connection:
            connection.sendall(whole[:cut])
            if cut == len(whole):
                assert connection.recv(200).startswith(b"HTTP/1.1 200")
    for noise in (
        b"\x00" * 999,
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST / HTTP/1.1\r\n" + b"a: b\r\n" * 9999,
    ):
        with socket.create_connection((address.hostname, address.port), timeout=5) as connection:
            connection.sendall(noise)
            connection.recv(200)
    check_healthy(server)


@pytest.mark.parametrize(
    "count", [2, pytest.param(300, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]
)
def test_the_openapi_document_is_kept(server, count):
    document = server.http.get("/openapi.json").json()
    schema = schemathesis.openapi.from_dict(document)
    checks = [status_code_conformance, content_type_conformance, response_schema_conformance]
    found: list[Any] = list(schema.get_all_operations())
    operations = [result.ok() for result in found]
    assert len(operations) >= 15
    for operation in operations:

        @settings(parent=QUIET, max_examples=count)
        @given(operation.as_strategy())
        def kept(case):
            response = case.call(base_url=server.url, timeout=20)
            assert response.status_code < 500 or case.path in ("/health", "/ready"), response.text
            case.validate_response(response, checks=checks)

        kept()
    check_healthy(server)
