"""Who may come in, and how much they may carry."""

import httpx2
import openai
import pytest

KEYS = frozenset({"sk-one", "sk-two"})


@pytest.fixture(scope="module")
def locked(start_server):
    hosts = frozenset({"127.0.0.1", "localhost", "[::1]"})
    settings = {"api_keys": KEYS, "allowed_hosts": hosts, "max_body_bytes": 5000}
    with start_server(cors_origins=("http://ok.example",), **settings) as server:
        yield server


def test_every_key_and_either_header_opens(locked):
    for key in KEYS:
        for headers in ({"authorization": f"Bearer {key}"}, {"x-api-key": key}):
            assert locked.http.get("/v1/models", headers=headers).status_code == 200


def test_without_a_key_only_the_front_door_is_open(locked):
    for path in ("/v1/models", "/openapi.json", "/v1/models/tiny", "/nothing"):
        response = locked.http.get(path)
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
    assert locked.chat().status_code == 401
    for path in ("/", "/health", "/web/chat.js"):
        assert locked.http.get(path).status_code == 200


def test_the_official_client_hears_of_a_wrong_key(locked):
    client = openai.OpenAI(base_url=f"{locked.url}/v1", api_key="sk-three")
    with client, pytest.raises(openai.AuthenticationError) as caught:
        client.models.list()
    assert caught.value.code == "invalid_api_key"


def test_a_key_keeps_its_cached_prefixes_to_itself(locked):
    def cached(key):
        messages = [{"role": "user", "content": "北京" * 40}]
        headers = {"x-api-key": key}
        body = {"messages": messages}
        answer = locked.http.post("/v1/chat/completions", json=body, headers=headers).json()
        return answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert cached("sk-one") == 0
    assert cached("sk-two") == 0
    assert cached("sk-one") > 0


def test_a_page_whose_name_was_pointed_here_is_refused(locked):
    headers = {"host": "evil.example:80", "x-api-key": "sk-one"}
    response = locked.http.get("/v1/models", headers=headers)
    assert response.status_code == 403
    assert response.json()["error"]["code"] == "host_not_allowed"
    for host in ("localhost:8000", "LOCALHOST", "[::1]:8000", "127.0.0.1"):
        headers = {"host": host, "x-api-key": "sk-one"}
        assert locked.http.get("/v1/models", headers=headers).status_code == 200


def test_a_server_open_to_the_network_answers_to_any_name(server):
    assert server.http.get("/health", headers={"host": "box.example"}).status_code == 200


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_body_too_large_is_refused(locked, is_chunked):
    body = b'{"messages": "' + b"x" * 5000 + b'"}'
    headers = {"content-type": "application/json", "x-api-key": "sk-one"}
    content = iter([body[:100], body[100:]]) if is_chunked else body
    with httpx2.Client(base_url=locked.url) as client:
        response = client.post("/v1/chat/completions", content=content, headers=headers)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"


def test_a_huge_body_is_refused_so_that_the_official_client_hears_it(locked):
    client = openai.OpenAI(base_url=f"{locked.url}/v1", api_key="sk-one", max_retries=0)
    big = "x" * 20_000_000
    with client, pytest.raises(openai.APIStatusError) as caught:
        client.completions.create(model="tiny", prompt=big)
    assert caught.value.status_code == 413


def test_anything_but_json_is_refused(server):
    for headers in ({}, {"content-type": "text/plain"}):
        response = server.http.post("/v1/chat/completions", content=b"{}", headers=headers)
        assert response.status_code == 415
        assert "application/json" in response.json()["error"]["message"]


def test_other_origins_are_answered_only_when_named(locked, server):
    asked = {"origin": "http://ok.example", "access-control-request-method": "POST"}
    allowed = "access-control-allow-origin"
    assert locked.http.options("/v1/models", headers=asked).headers[allowed] == "http://ok.example"
    other = asked | {"origin": "http://evil.example"}
    assert allowed not in locked.http.options("/v1/models", headers=other).headers
    assert allowed not in server.http.get("/v1/models", headers=asked).headers


def test_a_response_carries_the_id_of_its_request(server):
    given = server.http.get("/health", headers={"x-request-id": "mine-1"})
    assert given.headers["x-request-id"] == "mine-1"
    made = [server.http.get("/nothing").headers["x-request-id"] for _ in range(2)]
    assert made[0] != made[1]
    sly = server.http.get("/health", headers={"x-request-id": "a b"})
    assert sly.headers["x-request-id"].startswith("req_")
