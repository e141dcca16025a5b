import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from astrai_core.model import AutoModel, ModelConfig
from astrai_core.model.weights import INDEX, WEIGHTS, read_tensors, write_tensors

CONFIG = ModelConfig(vocab_size=20, dim=16, n_layers=2, dim_ffn=24, n_heads=2)
NORM = "model.norm.weight"


@pytest.fixture
def folder(tmp_path):
    """A whole model folder."""
    torch.manual_seed(0)
    AutoModel.save_pretrained(AutoModel.from_config(CONFIG), tmp_path / "model")
    return tmp_path / "model"


def change(folder, **tensors):
    """Rewrite the weights; None takes a tensor away. `_` stands for a dot."""
    content = load_file(folder / WEIGHTS)
    for name, tensor in tensors.items():
        content.pop(name, None)
        if tensor is not None:
            content[name] = tensor
    save_file(content, folder / WEIGHTS)


def shard(folder):
    """Split the weights over two files and an index, as large models come."""
    content = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(content)
    parts = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: content[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return content


def test_shards_give_the_same_model(folder):
    whole = AutoModel.from_pretrained(folder).state_dict()
    shard(folder)
    parts = AutoModel.from_pretrained(folder).state_dict()
    assert all(torch.equal(parts[name], tensor) for name, tensor in whole.items())
    assert parts.keys() == whole.keys()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({NORM: None}, "lacks norm.weight"),
        ({"model.extra": torch.ones(2)}, "unknown tensor extra"),
        ({NORM: torch.ones(15)}, r"norm.weight has shape \(15,\), config.json asks \(16,\)"),
        ({NORM: torch.ones(16, dtype=torch.int8)}, "numbers of another kind"),
        ({"norm.weight": torch.ones(16)}, "norm.weight twice"),
        ({"lm_head.weight": torch.ones(20, 16)}, "ties lm_head .* two different matrices"),
    ],
    ids=["missing", "left over", "shape", "kind", "twice", "untied"],
)
def test_weights_that_do_not_fit_are_refused_by_name(tensors, message, folder):
    change(folder, **tensors)
    with pytest.raises(ValueError, match=message):
        AutoModel.from_pretrained(folder)


def test_a_long_list_of_missing_weights_is_cut(folder):
    save_file({NORM: torch.ones(16)}, folder / WEIGHTS)
    with pytest.raises(ValueError, match=r"lacks embed_tokens.weight, .* and \d+ more$"):
        AutoModel.from_pretrained(folder)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_file_is_named(keep, folder):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or not a safetensors"):
        AutoModel.from_pretrained(folder)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {NORM: "../other/model.safetensors"}}, "not in the folder"),
        ({"weight_map": {NORM: "/etc/passwd"}}, "not in the folder"),
        ({"weight_map": {NORM: ".."}}, "lacks the shard"),
        ({"weight_map": {NORM: "three.safetensors"}}, "lacks the shard three.safetensors"),
        ({"weight_map": {NORM: 3}}, "lacks the shard 3"),
        ({"weight_map": []}, "has no weight_map"),
        ({}, "has no weight_map"),
        ([], "must hold a JSON object"),
    ],
    ids=str,
)
def test_a_broken_index_is_refused(index, message, folder):
    shard(folder)
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        AutoModel.from_pretrained(folder)


def test_a_missing_shard_is_named(folder):
    shard(folder)
    (folder / "two.safetensors").unlink()
    with pytest.raises(ValueError, match=f"lacks the shard two.safetensors that {INDEX} names"):
        AutoModel.from_pretrained(folder)


def test_a_pickle_is_never_opened(folder):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("the pickle ran",))

    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="pickled weights"):
        AutoModel.from_pretrained(folder)


def test_a_type_asked_for_is_given_and_mixed_types_become_one(folder):
    assert AutoModel.from_pretrained(folder, torch.bfloat16).norm.weight.dtype == torch.bfloat16
    change(folder, **{NORM: torch.ones(16, dtype=torch.bfloat16)})
    model = AutoModel.from_pretrained(folder)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model(torch.tensor([[1, 2]]))["logits"].isfinite().all()


def test_views_and_empty_tensors_are_written(tmp_path):
    matrix = torch.arange(12.0).view(3, 4)
    tensors = {"turned": matrix.t(), "empty": torch.empty(0, 3)}
    write_tensors(tmp_path / "x.safetensors", tensors)
    back = dict(read_tensors(tmp_path / "x.safetensors"))
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


def test_large_bytes_may_stay_in_the_file_and_are_not_written_back(tmp_path):
    file = tmp_path / "x.safetensors"
    written = {"odd": torch.ones(3, dtype=torch.int8), "large": torch.ones(600, 700).to(torch.int8)}
    write_tensors(file, written)
    content = file.read_bytes()
    read = dict(read_tensors(file, maps_bytes=True))
    assert all(torch.equal(read[name], tensor) for name, tensor in written.items())
    assert maps_of(file) == 1
    read["large"][0] = 7
    assert file.read_bytes() == content
    read.clear()
    assert maps_of(file) == 0


def maps_of(file):
    """How many mappings of the file this process has."""
    return Path("/proc/self/maps").read_text().count(str(file))


def test_every_kind_and_shape_is_read_as_it_was_written(tmp_path):
    kinds = {
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    }  # fmt: skip
    written = {str(kind): torch.arange(6).view(2, 3).to(kind) for kind in kinds}
    written |= {"scalar": torch.tensor(2.5), "none": torch.empty(0, 3)}
    write_tensors(tmp_path / "x.safetensors", written, {"note": "not a tensor"})
    read = dict(read_tensors(tmp_path / "x.safetensors"))
    assert read.keys() == written.keys()
    for name, tensor in read.items():
        wanted = written[name]
        assert (tensor.dtype, tensor.shape) == (wanted.dtype, wanted.shape)
        assert tensor.double().equal(wanted.double())
        assert tensor.untyped_storage().nbytes() == wanted.nbytes  # not a view of the whole file
