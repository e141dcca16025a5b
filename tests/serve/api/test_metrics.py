"""Metrics as Prometheus reads them."""

from prometheus_client.parser import text_string_to_metric_families

NAMES = [
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "prefix_cache_queries",
    "prefix_cache_hits",
    "prompt_tokens",
    "generation_tokens",
    "request_success",
    "num_preemptions",
    "spec_decode_num_draft_tokens",
    "spec_decode_num_accepted_tokens",
    "iteration_tokens_total",
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
    "engine_step_age_seconds",
    "requests_cancelled",
    "requests_rejected",
]


def read(server):
    """Samples by name and labels."""
    response = server.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = list(text_string_to_metric_families(response.text))
    return families, {
        (s.name, *sorted(s.labels.values())): s.value for f in families for s in f.samples
    }


def grown(server, act):
    """What an act adds to each sample."""
    before = read(server)[1]
    act()
    server.wait_idle()
    after = read(server)[1]
    return {name: value - before.get(name, 0) for name, value in after.items()}


def test_all_names_that_dashboards_know_are_there(server):
    families = {family.name: family for family in read(server)[0]}
    assert {f"astrai:{name}" for name in NAMES} <= families.keys()
    assert all(family.documentation and family.type != "unknown" for family in families.values())


def test_a_request_is_counted_in_each(server):
    server.say("hello world")
    added = grown(server, lambda: server.chat("世界" * 40))
    tokens = len(server.tokenizer.encode("hello world")) + 1
    assert added["astrai:generation_tokens_total",] == tokens
    assert added["astrai:request_success_total", "stop"] == 1
    assert added["astrai:request_generation_tokens_sum",] == tokens
    assert added["astrai:inter_token_latency_seconds_count",] == tokens - 1
    prompt = added["astrai:prompt_tokens_total",]
    assert prompt == added["astrai:request_prompt_tokens_sum",] > 40
    assert added["astrai:prefix_cache_queries_total",] == prompt
    for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time"):
        assert added[f"astrai:{name}_seconds_count",] == 1
    queue, prefill, decode, whole = (
        added[f"astrai:{name}_seconds_sum",]
        for name in ("request_queue_time", "request_prefill_time", "request_decode_time",
                     "e2e_request_latency")
    )  # fmt: skip
    assert queue + prefill + decode <= whole <= queue + prefill + decode + 0.5


def test_buckets_grow_to_the_count(server):
    server.chat()
    families = read(server)[0]
    for family in (family for family in families if family.type == "histogram"):
        buckets = [s.value for s in family.samples if s.name.endswith("_bucket")]
        count = next(s.value for s in family.samples if s.name.endswith("_count"))
        assert buckets == sorted(buckets)
        assert buckets[-1] == count > 0


def test_refusals_and_leavers_are_counted_by_reason(server):
    added = grown(server, lambda: server.chat(temperature=9))
    assert added["astrai:requests_rejected_total", "invalid_request_error"] == 1
    added = grown(server, lambda: server.chat(model="other"))
    assert added["astrai:requests_rejected_total", "model_not_found"] == 1

    def leave():
        server.say("hello " * 60)
        server.hold(at=2)
        body = {"messages": [{"role": "user", "content": "hi"}], "stream": True}
        with server.http.stream("POST", "/v1/chat/completions", json=body) as response:
            next(response.iter_bytes())
        server.wait_cancelled()

    assert grown(server, leave)["astrai:requests_cancelled_total", "disconnect"] == 1


def test_metrics_and_version_need_the_key_and_ready_does_not(start_server):
    with start_server(api_keys=frozenset({"sk"})) as server:
        for path in ("/metrics", "/version", "/tokenizer_info", "/openapi.json"):
            assert server.http.get(path).status_code == 401, path
            assert server.http.get(path, headers={"x-api-key": "sk"}).status_code == 200, path
        for path in ("/health", "/ready"):
            assert server.http.get(path).json() == {"status": "ok"}
