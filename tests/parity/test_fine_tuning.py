"""Folders of the families are trained by `astrai-train fit`, cut off, resumed, and stay theirs."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from astrai_core.generation import SamplingParams
from astrai_core.model import AutoModel
from astrai_serve import LLM
from astrai_serve.engine import EngineConfig
from astrai_train.cli import main

from ..e2e.cut_run import cut_off_after

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

QUICK = ["deepseek_v3 query latent, groups, yarn"]
SLOW = [
    "llama biases, llama3",
    "mistral window",
    "qwen2 upper windows, yarn",
    "qwen3 tied",
    "qwen3_moe first dense, window",
    "deepseek_v2 query latent, groups, biases, yarn",
]


def options_of_fit(start: Path, folder: Path) -> list[str]:
    """Four steps of chats, a checkpoint after each second."""
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"{a}加{b}？"},
                {"role": "assistant", "content": f"{a + b}, hello"},
            ]
        }
        for a in range(6)
        for b in range(6)
    ]
    lines = "".join(json.dumps(chat) + "\n" for chat in chats)
    (folder / "chats.jsonl").write_text(lines, encoding="utf-8")
    content = {
        "seed_everything": 7,
        "trainer": {
            "accelerator": "cpu", "max_steps": 4, "val_check_interval": 4, "limit_val_batches": 1,
        },
        "checkpoint": {"every_n_steps": 2, "every_minutes": 0},
        "model": {
            "class_path": "SFTModule",
            "init_args": {
                "init_from": str(start), "compile": False, "schedule": {"warmup_steps": 1},
                "optimizer": {"lr": 0.01},
            },
        },
        "data": {
            "class_path": "TokenDataModule",
            "init_args": {
                "tokenizer": str(start), "train": str(folder / "chats.jsonl"),
                "val": str(folder / "chats.jsonl"), "stage": "sft", "window_size": 48,
                "batch_size": 2,
            },
        },
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    return ["fit", "--config", str(folder / "run.yaml")]


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_a_foreign_folder_is_tuned_resumed_and_served_as_what_it_was(
    name, make_family, tokenizer, tmp_path
):
    theirs = make_family(name, tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    options = options_of_fit(tmp_path / "start", tmp_path)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    main([*options, "--trainer.default_root_dir", str(whole)])
    cut_off_after(2, whole, cut)
    main([*options, "--trainer.default_root_dir", str(cut)])
    last = whole / "checkpoints" / "last"
    tuned, resumed = (
        load_file(run / "checkpoints" / "last" / "model.safetensors") for run in (whole, cut)
    )
    assert all(torch.equal(resumed[key], tensor) for key, tensor in tuned.items())
    before = load_file(tmp_path / "start" / "model.safetensors")
    assert tuned.keys() == before.keys()
    assert not any(torch.equal(tuned[key], tensor) for key, tensor in before.items())

    back = transformers.AutoModelForCausalLM.from_pretrained(last)
    assert type(back) is type(theirs)
    ids = torch.randint(300, (1, 9))
    ours = AutoModel.from_pretrained(last)
    with torch.no_grad():
        logits = ours(ids)["logits"]
        torch.testing.assert_close(logits, back(ids).logits, atol=1e-5, rtol=1e-5)
    wanted = back.generate(ids, max_new_tokens=10, do_sample=False)[0, 9:].tolist()
    llm = LLM(last, config=EngineConfig(page_size=4, num_pages=32))
    answer = llm.generate(ids.tolist(), SamplingParams(temperature=0, max_tokens=10))[0]
    assert answer.token_ids == tuple(wanted)
