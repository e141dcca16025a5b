"""Settings that cannot work are refused by name, with the way out."""

from typing import Any

import pytest

from astrai_serve.engine import EngineConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"page_size": 0}, "page_size must be a positive integer, not 0"),
        ({"page_size": None}, "page_size must be a positive integer, not None"),
        ({"page_size": 2.5}, "page_size must be a positive integer, not 2.5"),
        ({"page_size": True}, "page_size must be a positive integer, not True"),
        ({"num_pages": 0}, "num_pages must be a positive integer, not 0"),
        ({"max_context": -1}, "max_context must be a positive integer, not -1"),
        ({"max_running_tasks": 0}, "max_running_tasks must be a positive integer"),
        ({"max_queued_tasks": 0}, "max_queued_tasks must be a positive integer"),
        ({"max_step_tokens": 0}, "max_step_tokens must be a positive integer"),
        ({"max_chunk_tokens": 0}, "max_chunk_tokens must be a positive integer"),
        ({"num_threads": 0}, "num_threads must be a positive integer"),
        ({"kv_cache_gb": 0}, "kv_cache_gb must be above 0, not 0"),
        ({"kv_cache_gb": float("nan")}, "kv_cache_gb must be above 0, not nan"),
        ({"stall_seconds": -1.0}, "stall_seconds must be above 0, not -1.0"),
        ({"speculative_tokens": -1}, "speculative_tokens must be at least 0, not -1"),
        ({"headroom_pages": -1}, "headroom_pages must be at least 0, not -1"),
        (
            {"max_running_tasks": 33, "max_step_tokens": 32},
            "max_running_tasks 33 exceeds max_step_tokens 32.*lower the first or raise the second",
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_bad_value_names_itself(settings: dict[str, Any], message):
    with pytest.raises(ValueError, match=message):
        EngineConfig(**settings)


def test_none_and_the_limits_themselves_are_taken():
    EngineConfig(num_pages=None, max_context=None, max_chunk_tokens=None, num_threads=None)
    EngineConfig(kv_cache_gb=None)
    EngineConfig(max_running_tasks=8, max_step_tokens=8, headroom_pages=0, page_size=1)
