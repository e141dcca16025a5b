"""Prometheus' text format, under the names that dashboards of vLLM know, with our prefix."""

import math
from collections.abc import Iterable, Mapping, Sequence

from astrai_serve.api.backend import Engine
from astrai_serve.engine.statistics import Histogram

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PREFIX = "astrai:"

_GAUGES = {
    "num_requests_running": ("num_running", "Tasks that are computed."),
    "num_requests_waiting": ("num_waiting", "Tasks that wait for pages or their turn."),
    "kv_cache_usage_perc": ("kv_cache_usage", "Share of the KV cache's pages in use; 1 is all."),
    "kv_cache_pages": ("num_pages", "Pages of the KV cache."),
    "kv_cache_cached_pages": ("num_cached_pages", "Free pages that a prompt may still reuse."),
    "engine_step_age_seconds": ("step_age", "Age of the running step; 0 between steps."),
}
_COUNTERS = {
    "prefix_cache_queries_total": ("prefix_cache_queries", "Prompt tokens looked up in the cache."),
    "prefix_cache_hits_total": ("prefix_cache_hits", "Prompt tokens found in the cache."),
    "prompt_tokens_total": ("prompt_tokens", "Tokens of prompts taken."),
    "generation_tokens_total": ("generation_tokens", "Tokens generated."),
    "num_preemptions_total": ("num_preemptions", "Tasks sent back to wait for pages."),
    "spec_decode_num_draft_tokens_total": ("draft_tokens", "Tokens guessed ahead."),
    "spec_decode_num_accepted_tokens_total": ("accepted_tokens", "Guesses that were right."),
    "engine_steps_total": ("num_steps", "Steps computed."),
}
_HISTOGRAMS = {
    "time_to_first_token_seconds": "From arrival to the first token.",
    "inter_token_latency_seconds": "Between successive tokens of a task.",
    "e2e_request_latency_seconds": "From arrival to the end.",
    "request_queue_time_seconds": "From arrival to the first step.",
    "request_prefill_time_seconds": "From the first step to the first token.",
    "request_decode_time_seconds": "From the first token to the last.",
    "request_prompt_tokens": "Prompt tokens of tasks that have ended.",
    "request_generation_tokens": "Generated tokens of tasks that have ended.",
    # the facts' name has the total, as a counter of all steps' tokens would
    "iteration_tokens_total": "Tokens computed in a step.",
}
_ENDED = "num_finished_"


class Counter:
    """Counts by reason.

    Args:
        reasons: counted from 0; others are from their first one.
    """

    def __init__(self, reasons: Iterable[str] = ()):
        self.values = dict.fromkeys(reasons, 0)

    def add(self, reason: str) -> None:
        """Count one."""
        self.values[reason] = self.values.get(reason, 0) + 1


def render(engine: Engine, cancelled: Counter, rejected: Counter) -> str:
    """Write all metrics.

    Args:
        engine: tells of tasks and steps.
        cancelled: requests that did not end by themselves.
        rejected: requests that were answered with an error, by its code.
    """
    stats = engine.stats()
    lines: list[str] = []
    for name, (key, text) in _GAUGES.items():
        lines += _family(name, "gauge", text, [("", stats[key])])
    for name, rate, text in (
        ("prefill_tokens_per_second", engine.statistics.prefill, "Speed of prompts, of late."),
        ("decode_tokens_per_second", engine.statistics.decode, "Speed of answers, of late."),
    ):
        lines += _family(name, "gauge", text, [("", rate.per_second or 0.0)])
    lines += _family("engine_healthy", "gauge", "1 while steps come to an end.",
                     [("", int(engine.healthy))])  # fmt: skip
    for name, (key, text) in _COUNTERS.items():
        lines += _family(name, "counter", text, [("", stats[key])])
    ends = {key.removeprefix(_ENDED): n for key, n in stats.items() if key.startswith(_ENDED)}
    lines += _family(
        "request_success_total", "counter", "Tasks that came to an end of their own.",
        _labelled("finished_reason", {r: ends.get(r, 0) for r in ("stop", "length")}),
    )  # fmt: skip
    lines += _family(
        "request_failure_total", "counter", "Tasks that an error ended.", [("", ends["error"])]
    )
    lines += _family(
        "requests_cancelled_total", "counter", "Requests that did not end by themselves.",
        _labelled("reason", cancelled.values),
    )  # fmt: skip
    lines += _family(
        "requests_rejected_total", "counter", "Requests answered with an error, by its code.",
        _labelled("reason", rejected.values),
    )  # fmt: skip
    histograms = engine.statistics.histograms()
    for name, text in _HISTOGRAMS.items():
        lines += _histogram(name, text, histograms[name.removesuffix("_total")])
    return "\n".join(lines) + "\n"


def _family(name: str, kind: str, text: str, samples: Sequence[tuple[str, float]]) -> Iterable[str]:
    yield f"# HELP {_PREFIX}{name} {text}"
    yield f"# TYPE {_PREFIX}{name} {kind}"
    for suffix, value in samples:
        yield f"{_PREFIX}{name}{suffix} {_number(value)}"


def _histogram(name: str, text: str, histogram: Histogram) -> Iterable[str]:
    total, samples = 0, []
    for bound, count in zip((*histogram.bounds, math.inf), list(histogram.counts), strict=True):
        total += count
        samples.append((f'_bucket{{le="{_number(bound)}"}}', total))
    samples += [("_sum", histogram.sum), ("_count", total)]
    return _family(name, "histogram", text, samples)


def _labelled(label: str, values: Mapping[str, int | float]) -> list[tuple[str, int | float]]:
    return [(f'{{{label}="{_escape(key)}"}}', value) for key, value in values.items()]


def _escape(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    return "+Inf" if value == math.inf else repr(value)
