import json

import pytest

from astrai_core.generation import SamplingParams
from astrai_serve.generation_defaults import GenerationDefaults


def read(folder, content):
    (folder / "generation_config.json").write_text(json.dumps(content))
    return GenerationDefaults.read(folder)


def test_a_folder_without_the_file_filters_nothing(tmp_path):
    assert GenerationDefaults.read(tmp_path) == GenerationDefaults()
    assert str(GenerationDefaults()) == "temperature 1"


def test_the_folders_wishes_are_told(tmp_path):
    wishes = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.1, "eos_token_id": [1, 2]}
    wishes |= {"max_new_tokens": 64}
    defaults = read(tmp_path, wishes)
    assert defaults == GenerationDefaults(
        temperature=0.6, top_k=20, top_p=0.95, min_p=0.1, max_new_tokens=64
    )
    assert str(defaults) == "temperature 0.6, top_k 20, top_p 0.95, min_p 0.1, max_new_tokens 64"


def test_a_wish_that_is_not_fulfilled_is_refused_by_name(tmp_path):
    assert read(tmp_path, {"num_beams": 1, "typical_p": 1.0, "suppress_tokens": None})
    with pytest.raises(ValueError, match=r"no_repeat_ngram_size 3 is not supported; take it out"):
        read(tmp_path, {"no_repeat_ngram_size": 3})


def test_a_folder_that_does_not_sample_is_greedy(tmp_path):
    wishes = {"temperature": 0.6, "top_p": 0.5, "repetition_penalty": 1.1, "max_new_tokens": 9}
    defaults = read(tmp_path, {"do_sample": False, **wishes})
    assert defaults == GenerationDefaults(
        temperature=0, repetition_penalty=1.1, max_new_tokens=9
    ), "greedy decoding is penalised too, as in transformers"


def test_the_wishes_as_parameters_of_the_engine(tmp_path):
    wishes = {"temperature": 0.6, "top_k": 20.0, "top_p": 0, "max_new_tokens": 9}
    wanted = SamplingParams(temperature=0.6, top_k=20, top_p=1e-9, max_tokens=9)
    assert read(tmp_path, wishes).sampling == wanted


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("top_p", 1.5),
        ("temperature", -1),
        ("top_k", "20"),
        ("repetition_penalty", 0),
        ("max_new_tokens", 0),
    ],
)
def test_a_wish_out_of_range_is_refused_at_the_start(tmp_path, name, value):
    with pytest.raises(
        ValueError, match=rf"generation_config.json: {name} must be .* not {value!r}"
    ):
        read(tmp_path, {name: value})
