import dataclasses
import math
from typing import Any

import pytest

from astrai_core.generation import SamplingParams, Structure


def test_the_defaults_are_plain_sampling():
    params = SamplingParams()
    assert (params.temperature, params.top_k, params.top_p, params.min_p) == (1.0, 0, 1.0, 0.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.temperature = 0.5  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0},
        {"temperature": 100},
        {"top_p": 1e-9},
        {"min_p": 1},
        {"max_tokens": 1},
        {"min_tokens": 5, "max_tokens": 5},
        {"logprobs": 0},
        {"logit_bias": ((0, -100.0),)},
    ],
    ids=str,
)
def test_the_edges_are_allowed(fields):
    params = SamplingParams(**fields)
    assert all(getattr(params, name) == value for name, value in fields.items())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("top_k", -1),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("repetition_penalty", 0),
        ("repetition_penalty", math.nan),
        ("presence_penalty", 101),
        ("frequency_penalty", -101),
        ("logprobs", -1),
        ("stop", ("a", "")),
        ("logit_bias", ((3, math.nan),)),
        ("logit_bias", ((-3, 1.0),)),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"^{field} must be .*, not "):
        SamplingParams(**{field: value})


def test_more_least_than_most_tokens_is_a_contradiction():
    with pytest.raises(ValueError, match="min_tokens 6 exceeds max_tokens 5"):
        SamplingParams(min_tokens=6, max_tokens=5)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", "0.5"),
        ("temperature", None),
        ("temperature", True),
        ("top_k", 1.5),
        ("max_tokens", "5"),
        ("max_tokens", True),
        ("seed", 1.0),
        ("logprobs", "1"),
        ("prompt_logprobs", -1),
        ("stop", "end"),
        ("stop", (3,)),
        ("stop_token_ids", ("3",)),
        ("stop_token_ids", 3),
        ("logit_bias", {3: 1.0}),
        ("logit_bias", ((3,),)),
        ("logit_bias", (("3", 1.0),)),
        ("ignore_eos", 1),
        ("structure", {"regex": "a"}),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"^{field} must be .*, not "):
        SamplingParams(**{field: value})


def test_lists_are_as_good_as_tuples():
    lists: Any = {"stop": ["a"], "stop_token_ids": [3], "logit_bias": [[3, 1.0]]}
    tuples = SamplingParams(stop=("a",), stop_token_ids=(3,), logit_bias=((3, 1.0),))
    assert SamplingParams(**lists) == tuples
    assert hash(SamplingParams(**lists)) == hash(tuples)


@pytest.mark.parametrize(
    "fields",
    [{}, {"regex": "a", "grammar": "b"}, {"regex": 3}, {"choice": ()}, {"choice": "ab"}],
    ids=str,
)
def test_a_structure_is_one_thing(fields):
    with pytest.raises(ValueError, match=r"structure needs one of|must be"):
        Structure(**fields)


def test_a_schema_may_be_a_mapping():
    assert Structure.of_json({"enum": ["是"]}).json_schema == '{"enum": ["\\u662f"]}'
    assert Structure.of_json() == Structure(json_schema='{"type": "object"}')
