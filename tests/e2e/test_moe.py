"""A mixture of experts from `astrai-train fit` to the engine, through the real commands."""

import csv
import json
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

from astrai_core.cli import main as model_main
from astrai_core.generation import SamplingParams
from astrai_core.model import AutoModel
from astrai_core.tokenizer import AutoTokenizer
from astrai_serve import LLM
from astrai_serve.engine import EngineConfig
from astrai_train.cli import main

from .cut_run import cut_off_after

MOE = Path(__file__).parents[2] / "configs" / "model" / "moe.yaml"
SHAPES = {
    "gqa": {"n_heads": 2, "n_kv_heads": 1},
    "mla": {
        "n_heads": 2, "attn_type": "mla", "use_qk_norm": False, "kv_lora_rank": 8,
        "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "tie_weight": False,
    },
}  # fmt: skip


def make_options(tmp_path: Path, attention: str) -> list[str]:
    """Of `fit`: four steps of two micro-batches, a checkpoint after each second."""
    texts = [f"{a} plus {b} is {a + b}. 你好，世界！" for a in range(9) for b in range(9)]
    tokenizer = AutoTokenizer.train(texts, 290)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "texts.jsonl").write_text(lines, encoding="utf-8")
    shape = {"vocab_size": tokenizer.vocab_size, "dim": 16, "n_layers": 2, **SHAPES[attention]}
    content = {
        "seed_everything": 7,
        "trainer": {
            "accelerator": "cpu", "max_steps": 4, "accumulate_grad_batches": 2,
            "val_check_interval": 4, "limit_val_batches": 1, "log_every_n_steps": 1,
        },
        "checkpoint": {"every_n_steps": 2, "every_minutes": 0},
        "model": {
            "class_path": "SEQModule",
            "init_args": {"model": shape, "compile": False, "schedule": {"total_steps": 4}},
        },
        "data": {
            "class_path": "TokenDataModule",
            "init_args": {
                "tokenizer": str(tmp_path / "tokenizer"), "train": str(tmp_path / "texts.jsonl"),
                "val": str(tmp_path / "texts.jsonl"), "window_size": 32, "batch_size": 2,
            },
        },
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    return ["fit", "--config", str(tmp_path / "run.yaml"), "--config", str(MOE)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / "last" / "model.safetensors")


def test_experts_train_resume_and_tell(tmp_path, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = make_options(tmp_path, "gqa")
    main([*options, "--trainer.default_root_dir", str(whole)])
    cut_off_after(2, whole, cut)
    main([*options, "--trainer.default_root_dir", str(cut)])
    resumed, expected = weights(cut), weights(whole)
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    bias = expected["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert bias.abs().max() > 0
    # four steps of a thousandth up or down, or of none where a load is the mean itself
    torch.testing.assert_close(bias * 1000, (bias * 1000).round(), atol=1e-3, rtol=0)
    rows = list(csv.DictReader((whole / "metrics.csv").read_text("utf-8").splitlines()))
    trained = [row for row in rows if row["train/loss"]]
    assert len(trained) == 4
    for row in trained:
        assert 0 < float(row["train/moe_max_violation"]) < 8  # one in every pair of visits: 7
        assert 0 <= float(row["train/moe_idle_experts"]) < 1
    capsys.readouterr()
    model_main(["info", str(whole / "checkpoints" / "last")])
    told = capsys.readouterr().out
    assert "2 of 16 experts of 176, 1 shared, after 1 dense layers of 512" in told
    assert_served_as_computed(whole / "checkpoints" / "last")


def test_latent_attention_with_experts_trains_and_serves(tmp_path):
    main([*make_options(tmp_path, "mla"), "--trainer.default_root_dir", str(tmp_path / "run")])
    assert_served_as_computed(tmp_path / "run" / "checkpoints" / "last")


def assert_served_as_computed(folder: Path) -> None:
    """Greedy tokens of the engine are those of the full forward."""
    model, prompts = AutoModel.from_pretrained(folder), [[5, 9, 11], list(range(20, 50)), [7]]
    llm = LLM(folder, config=EngineConfig(num_pages=64, page_size=4, max_context=128))
    served = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
    for prompt, completion in zip(prompts, served, strict=True):
        tokens = list(prompt)
        with torch.inference_mode():
            for _ in range(8):
                tokens.append(int(model(torch.tensor([tokens]))["logits"][0, -1].argmax()))
        assert list(completion.token_ids) == tokens[len(prompt) :]
