from pathlib import Path

import pytest
import torch
import yaml

from astrai_core.model import ModelConfig, Transformer

FOLDER = Path(__file__).parents[2] / "configs" / "model"


def load(name: str) -> ModelConfig:
    content = yaml.safe_load((FOLDER / name).read_text("utf-8"))
    return ModelConfig.from_dict(content["model"]["init_args"]["model"])


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.yaml")), ids=lambda file: file.name)
def test_every_shape_can_be_built(file):
    with torch.device("meta"):
        Transformer(load(file.name))


def test_the_1b_model_has_the_parameters_that_its_file_says():
    with torch.device("meta"):
        model = Transformer(load("1b.yaml"))
    embedding = 65_536 * 2_048
    attention = 2_048 * (2_048 + 512 + 512 + 2_048 + 16) + 128 + 128
    norms = 20 * 2 * 2_048 + 2_048
    by_hand = embedding + 20 * (attention + 3 * 2_048 * 5_632) + norms
    assert sum(parameter.numel() for parameter in model.parameters()) == by_hand == 1_036_737_536
    assert f"{20 * attention:,}" in (FOLDER / "1b.yaml").read_text("utf-8")
