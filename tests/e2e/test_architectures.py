"""Kinds of attention and heads go from `astrai-train fit` to the engine by the same commands."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from astrai_core.generation import SamplingParams
from astrai_core.model import AutoModel, ModelConfig
from astrai_core.tokenizer import AutoTokenizer
from astrai_serve import LLM
from astrai_serve.engine import EngineConfig
from astrai_train.cli import main

from .cut_run import cut_off_after

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_len": 16, "mscale_all_dim": 1.0}
QUICK: dict[str, dict[str, Any]] = {
    "headwise gate, window in one block, yarn, untied": {
        "n_kv_heads": 1,
        "use_gated_attention": True,
        "sliding_window": 5,
        "sliding_window_layers": [0],
        "rope_scaling": YARN,
        "tie_weight": False,
    },
}
SLOW: dict[str, dict[str, Any]] = {
    "gqa, tied": {"n_kv_heads": 1},
    "elementwise gate, biases, tied": {
        "use_gated_attention": True,
        "attention_gate": "elementwise",
        "attention_bias": True,
        "attention_output_bias": True,
        "ffn_bias": True,
    },
    "mla, query latent, gate, interleaved, untied": {
        "attn_type": "mla",
        "use_qk_norm": False,
        "kv_lora_rank": 8,
        "q_lora_rank": 6,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "rope_interleaved": True,
        "rope_scaling": YARN,
        "use_gated_attention": True,
        "attention_gate": "elementwise",
        "tie_weight": False,
    },
}


def options_of_fit(fields: dict[str, Any], folder: Path) -> list[str]:
    """Four steps, a checkpoint after each second."""
    texts = [f"{a} plus {b} is {a + b}. 你好，世界！" for a in range(9) for b in range(9)]
    tokenizer = AutoTokenizer.train(texts, 290)
    tokenizer.save_pretrained(folder / "tokenizer")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "texts.jsonl").write_text(lines, encoding="utf-8")
    shape = {"vocab_size": tokenizer.vocab_size, "dim": 16, "n_layers": 2, "dim_ffn": 32}
    content = {
        "seed_everything": 7,
        "trainer": {
            "accelerator": "cpu", "max_steps": 4, "val_check_interval": 4, "limit_val_batches": 1,
        },
        "checkpoint": {"every_n_steps": 2, "every_minutes": 0},
        "model": {
            "class_path": "SEQModule",
            "init_args": {
                "model": {**shape, "n_heads": 2, **fields}, "compile": False,
                "schedule": {"warmup_steps": 1},
            },
        },
        "data": {
            "class_path": "TokenDataModule",
            "init_args": {
                "tokenizer": str(folder / "tokenizer"), "train": str(folder / "texts.jsonl"),
                "val": str(folder / "texts.jsonl"), "window_size": 32, "batch_size": 2,
            },
        },
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    return ["fit", "--config", str(folder / "run.yaml")]


@pytest.mark.parametrize(
    "fields",
    [*QUICK.values(), *(pytest.param(fields, marks=pytest.mark.slow) for fields in SLOW.values())],
    ids=[*QUICK, *SLOW],
)
def test_an_architecture_is_trained_resumed_and_served(fields, tmp_path):
    options = options_of_fit(fields, tmp_path)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    main([*options, "--trainer.default_root_dir", str(whole)])
    cut_off_after(2, whole, cut)
    main([*options, "--trainer.default_root_dir", str(cut)])
    last = whole / "checkpoints" / "last"
    trained, resumed = (
        load_file(run / "checkpoints" / "last" / "model.safetensors") for run in (whole, cut)
    )
    assert all(torch.equal(resumed[name], tensor) for name, tensor in trained.items())

    model = AutoModel.from_pretrained(last)
    told = json.loads((last / "config.json").read_text())
    assert ModelConfig.from_dict({**told, **fields}) == model.config
    ids = torch.randint(200, (1, 9))
    llm = LLM(last, config=EngineConfig(page_size=4, num_pages=32))
    answer = llm.generate(ids.tolist(), SamplingParams(temperature=0, max_tokens=8))[0]
    said = torch.tensor([[*ids[0].tolist(), *answer.token_ids]])
    with torch.no_grad():
        best = model(said)["logits"][0, 8:-1].argmax(-1)
    assert best.tolist() == list(answer.token_ids)
