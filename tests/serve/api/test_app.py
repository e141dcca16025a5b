"""What is at which address."""

from astrai_serve.engine import EngineConfig


def test_the_models_list_satisfies_the_official_client(server, client):
    listed = list(client.models.list())
    assert [model.id for model in listed] == ["tiny"]
    assert client.models.retrieve("tiny") == listed[0]
    assert server.http.get("/v1/models/other").json()["error"]["code"] == "model_not_found"
    assert server.http.get("/v1/models").json()["data"][0]["max_tokens"] == 512


def test_the_root_says_where_things_are(server):
    root = server.http.get("/", headers={"accept": "*/*"}).json()
    assert root["model"] == "tiny"
    for path in root["endpoints"].values():
        assert server.http.get(path).status_code in (200, 405), path


def test_wrong_addresses_are_answered_in_openais_words(server):
    missing = server.http.get("/v2/chat")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
    wrong = server.http.get("/v1/chat/completions")
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "method_not_allowed")


def test_health_turns_bad_when_the_engine_is_closed(start_server):
    with start_server() as server:
        assert server.http.get("/health").json() == {"status": "ok"}
        server.engine.close()
        assert server.http.get("/health").status_code == 503
        refused = server.chat()
        assert (refused.status_code, refused.headers["x-should-retry"]) == (500, "false")


def test_a_step_that_hangs_turns_health_bad_and_back(start_server):
    with start_server(engine_config=EngineConfig(stall_seconds=0.1)) as server:
        server.hold()
        messages = [{"role": "user", "content": "hi"}]
        body = {"messages": messages, "stream": True}
        with server.http.stream("POST", "/v1/chat/completions", json=body) as response:
            server.wait(lambda: server.http.get("/health").status_code == 503)
            server.script.go.set()
            response.read()
        assert server.http.get("/health").status_code == 200


def test_a_server_that_drains_takes_nothing_new(start_server):
    with start_server() as server:
        server.shutdown.drain()
        refused = server.chat()
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "shutting_down"
        assert int(refused.headers["retry-after"]) > 0
