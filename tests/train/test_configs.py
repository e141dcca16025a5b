"""Every run under configs/ is parsed, built and trained for two steps on data made here."""

import json
from pathlib import Path

import pytest
import yaml

from astrai_core.model import AutoModel, ModelConfig
from astrai_core.tokenizer import AutoTokenizer
from astrai_train.cli import main

CONFIGS = Path(__file__).parents[2] / "configs"
WHOLE = sorted([*CONFIGS.glob("*.yaml"), *CONFIGS.glob("demo/*.yaml"), *CONFIGS.glob("10m/*.yaml")])
# pieces laid over a whole run, as the comment at their head says
LAID_OVER = [["seq.yaml", "100m/seq.yaml"], ["seq.yaml", "model/1b.yaml", "1b/seq.yaml"]]
RUNS = [[file] for file in WHOLE] + [[CONFIGS / name for name in names] for names in LAID_OVER]
TEXTS = [f"{a} plus {b} is {a + b}. 你好，世界！" for a in range(9) for b in range(9)]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A tokenizer, a model folder and records of each stage."""
    folder = tmp_path_factory.mktemp("configs")
    tokenizer = AutoTokenizer.train(TEXTS, 290)
    tokenizer.save_pretrained(folder / "tokenizer")
    shape = ModelConfig(vocab_size=tokenizer.vocab_size, dim=16, n_layers=1, dim_ffn=32, n_heads=2)
    AutoModel.save_pretrained(AutoModel.from_config(shape), folder / "model")
    messages = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2"},
    ]
    write(folder / "seq.jsonl", [{"text": text} for text in TEXTS])
    write(folder / "sft.jsonl", [{"messages": messages}] * 40)
    pair = {"prompt": "1+1?", "chosen": "2", "rejected": "3 or so"}
    write(folder / "dpo.jsonl", [pair] * 40)
    checker = {"kind": "number", "expected": 2, "form": "digits", "unit": ""}
    entry = {"question": "", "answer": "2", "metadata": {"source_dataset": "leg_counting"}}
    asked = {"prompt": messages[:1], "checker": checker, "entry": entry}
    write(folder / "grpo.jsonl", [asked] * 8)
    return folder


def write(file: Path, records: list[dict]) -> None:
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def small(files: list[Path], world: Path, folder: Path) -> list[str]:
    """The options that make a whole run of ours one of seconds, on this machine."""
    content = yaml.safe_load(files[0].read_text("utf-8"))
    stage = content["data"]["init_args"]["stage"]
    options = {
        "trainer.default_root_dir": folder,
        "trainer.accelerator": "cpu",
        "trainer.max_steps": 2,
        "trainer.accumulate_grad_batches": 1,
        "model.init_args.compile": "false",
        "data.init_args.tokenizer": world / "tokenizer",
        "data.init_args.train": world / f"{stage}.jsonl",
        "data.init_args.val": world / f"{stage}.jsonl",
        "data.init_args.window_size": 32,
        "data.init_args.batch_size": 2,
    }
    if content["model"]["init_args"].get("init_from"):
        options["model.init_args.init_from"] = world / "model"
    else:
        options["model.init_args.model.dim"] = 48
        options["model.init_args.model.n_layers"] = 1
    if stage == "grpo":
        options["model.init_args.rollout.max_completion"] = 8
    options["trainer.log_every_n_steps"] = 1
    if len(files) > 1:
        options |= {
            "trainer.devices": 1,
            "trainer.strategy": "auto",
            "trainer.precision": "32-true",
        }
        options |= {"data.init_args.num_workers": 0, "model.init_args.model.dim_ffn": 64}
        options |= {"model.init_args.model.n_heads": 4, "model.init_args.model.n_kv_heads": 2}
        options |= {"model.init_args.model.vocab_size": 300}
    if content["trainer"].get("val_check_interval"):
        options["trainer.val_check_interval"] = 2
    return [f"--{key}={value}" for key, value in options.items()]


@pytest.mark.parametrize(
    "files", RUNS, ids=lambda files: " ".join(str(file.relative_to(CONFIGS)) for file in files)
)
def test_a_whole_run_trains_as_it_is_written(world, tmp_path, files, capsys):
    given = [f"--config={file}" for file in files]
    main(["fit", *given, *small(files, world, tmp_path)])
    assert "finished after 2 steps" in capsys.readouterr().out
    AutoModel.from_pretrained(tmp_path / "checkpoints" / "last")
    header = (tmp_path / "metrics.csv").read_text().splitlines()[0]
    assert "train/loss" in header
    assert (tmp_path / "report.html").stat().st_size > 1000


@pytest.mark.parametrize(
    "piece", sorted((CONFIGS / "trainer").glob("*.yaml")), ids=lambda file: file.name
)
def test_a_piece_goes_with_a_whole_run(piece, capsys):
    with pytest.raises(SystemExit) as end:
        main(["fit", f"--config={CONFIGS / 'seq.yaml'}", f"--config={piece}", "--print_config"])
    assert end.value.code == 0
    settings = yaml.safe_load(capsys.readouterr().out)["trainer"]
    assert yaml.safe_load(piece.read_text("utf-8"))["trainer"].items() <= settings.items()


@pytest.mark.parametrize(
    "file",
    sorted(file for file in CONFIGS.rglob("*.yaml") if file.parent.name != "demo"),
    ids=lambda file: str(file.relative_to(CONFIGS)),
)
def test_every_key_is_commented(file):
    above = ""
    for line in file.read_text("utf-8").splitlines():
        text = line.strip()
        key = text.partition(":")[0].removeprefix("- ")
        is_section = line[:1].strip() or key == "class_path" or text.endswith(":")
        if text and not text.startswith(("#", "- [", '- "')) and not is_section:
            assert above.startswith("#"), f"{key} has no comment"
        above = text
