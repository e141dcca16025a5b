"""A folder read for inference computes what its model does, and does not hang on its files."""

from pathlib import Path

import pytest
import torch

from astrai_core.model import AutoModel, ModelConfig
from astrai_core.model.fusion import fuse_
from astrai_core.model.inference import read_fused
from astrai_core.model.quantization import quantize_
from astrai_core.model.weights import WEIGHTS

SHAPE = ModelConfig(vocab_size=600, dim=512, n_layers=2, dim_ffn=640, n_heads=8, n_kv_heads=8)
IDS = torch.tensor([[1, 5, 2, 599]])


@pytest.mark.parametrize("scheme", [None, "w8a8", "int8", "int4"])
def test_a_fused_folder_is_the_fused_model_and_needs_its_files_no_more(tmp_path, scheme):
    torch.manual_seed(0)
    model = AutoModel.from_config(SHAPE)
    if scheme is not None:
        quantize_(model, scheme)
    AutoModel.save_pretrained(model, tmp_path / "model")
    file = tmp_path / "model" / WEIGHTS
    wanted = fuse_(AutoModel.from_pretrained(tmp_path / "model"))
    got = read_fused(tmp_path / "model")
    assert str(file) not in Path("/proc/self/maps").read_text()
    file.write_bytes(b"")
    with torch.no_grad():
        assert torch.equal(got(IDS)["logits"], wanted(IDS)["logits"])
    assert str(got) == str(wanted)
