import contextlib
import json
import math
import os
import pickletools
import resource
from collections import OrderedDict

import numpy as np
import pytest
import torch

from astrai_core.checkpoint import Checkpoint, load_state, save_state
from astrai_core.model import AutoModel, ModelConfig, Transformer
from astrai_core.tokenizer import AutoTokenizer

CONFIG = ModelConfig(vocab_size=300, dim=16, n_layers=1, dim_ffn=24, n_heads=2)


def make(trainer_state=None):
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.train(["你好 hello"], 262)
    return Checkpoint.of_model(Transformer(CONFIG), tokenizer, trainer_state)


@contextlib.contextmanager
def file_size_limit(limit: int):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def equal(a, b) -> bool:
    """Of equal type and value all the way down; tensors bit by bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b or (a != a and b != b)


def test_a_checkpoint_comes_back_and_is_a_model_folder(tmp_path):
    saved = make({"step": 7, "moments": {0: torch.randn(3)}})
    saved.save(tmp_path / "step-7")
    back = Checkpoint.load(tmp_path / "step-7")
    assert equal(dict(back.model_state), dict(saved.model_state))
    assert back.model_config == CONFIG
    assert equal(back.trainer_state, saved.trainer_state)
    assert back.tokenizer is not None
    assert back.tokenizer.encode("你好") == AutoTokenizer.train(["你好 hello"], 262).encode("你好")
    served = AutoModel.from_pretrained(tmp_path / "step-7").state_dict()
    assert equal(dict(served), dict(saved.model_state))


def test_all_that_an_optimizer_holds_comes_back(tmp_path):
    shared = torch.randn(4)
    state = {
        "ints as keys": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(2, 3)}, 1: {}},
        "key 1 and '1'": {1: torch.zeros(1), "1": torch.ones(1)},
        "a/b": torch.zeros(2),
        "a": {"b": torch.ones(2)},
        "betas": (0.9, 0.95),
        "nested": [(1, (2, [None])), ()],
        "bfloat16": torch.randn(5).bfloat16(),
        "bytes": torch.get_rng_state(),
        "empty": torch.empty(0, 3),
        "twice": [shared, shared, shared[1:]],
        "strided": torch.randn(3, 4).t(),
        "numbers": [1e-300, 0.1 + 0.2, math.inf, math.nan, -0.0, 2**70, True, None, "文"],
    }
    save_state(tmp_path, state)
    assert equal(load_state(tmp_path), state)


@pytest.mark.parametrize(
    ("state", "where"),
    [
        ({"a": {"b": [0, {1}]}}, "state/a/b/1 is a set"),
        ({"a": np.float64(1)}, "state/a is a float64"),
        ({"a": {(1, 2): 3}}, r"state/a has the key \(1, 2\)"),
    ],
    ids=str,
)
def test_what_could_not_come_back_is_refused_where_it_stands(state, where, tmp_path):
    with pytest.raises(TypeError, match=where):
        save_state(tmp_path, state)


def test_an_ordered_dict_comes_back_as_a_dict_in_its_order(tmp_path):
    save_state(tmp_path, {"a": OrderedDict(z=1, y=2)})
    assert equal(load_state(tmp_path), {"a": {"z": 1, "y": 2}})


def test_a_refused_state_leaves_nothing(tmp_path):
    with pytest.raises(TypeError):
        make({"a": {1}}).save(tmp_path / "step")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "state.json").unlink(), "lacks state.json"),
        (lambda f: (f / "state.safetensors").unlink(), "lacks state.safetensors"),
        (lambda f: (f / "state.json").write_text('{"dict": [["a"'), "not readable JSON"),
        (lambda f: (f / "state.json").write_text('{"dict": [["a", 3]]}'), "is damaged"),
        (lambda f: (f / "state.json").write_text('{"tensor": "b"}'), "is damaged"),
        (lambda f: os.truncate(f / "state.safetensors", 20), "truncated"),
    ],
)
def test_a_damaged_state_is_named(damage, message, tmp_path):
    make({"a": torch.ones(3)}).save(tmp_path / "step")
    damage(tmp_path / "step" / "trainer")
    with pytest.raises(ValueError, match=message):
        Checkpoint.load(tmp_path / "step")


def test_nothing_written_is_a_pickle(tmp_path):
    make({"a": torch.ones(3)}).save(tmp_path / "step")
    files = [path for path in (tmp_path / "step").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    for path in files:
        if path.suffix == ".json":
            json.loads(path.read_text("utf-8"))
        else:
            with pytest.raises(ValueError):  # noqa: PT011 - whatever it says, it is no pickle
                list(pickletools.genops(path.read_bytes()))


def test_a_full_disk_leaves_the_old_checkpoint_and_no_temporary(tmp_path):
    """A limit on file sizes fails as a full disk does, at the first file too large for it."""
    make({"small": torch.zeros(4)}).save(tmp_path / "step")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    checkpoint = make({"big": torch.ones(40_000)})
    for limit in (0, 1000, 20_000, 100_000):  # weights, tokenizer, the trainer's tensors
        with file_size_limit(limit), pytest.raises(OSError, match="too large"):
            checkpoint.save(tmp_path / "step")
        assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
        assert [path.name for path in tmp_path.iterdir()] == ["step"]
    checkpoint.save(tmp_path / "step")
    assert equal(Checkpoint.load(tmp_path / "step").trainer_state, checkpoint.trainer_state)


def test_the_tokenizer_too_reports_a_full_disk(tmp_path):
    tokenizer = make().tokenizer
    assert tokenizer is not None
    with file_size_limit(1000), pytest.raises(OSError, match="too large"):
        tokenizer.save_pretrained(tmp_path / "t")
