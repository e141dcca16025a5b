"""Does `astrai-train plan` tell the truth? What it predicts beside what a short run then takes.

Both in one sitting, each in a process of its own; a plan's probe and a run's steps alternate, and
the best of each counts.

    python benchmarks/plan.py
    python benchmarks/plan.py --rounds 3 demo
"""

import argparse
import csv
import os
import random
import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

SHAPES = {
    # the demo's rows and model, and a model of about 100M parameters
    "demo": {
        "model": "{vocab_size: 4096, dim: 128, n_layers: 4, dim_ffn: 352, n_heads: 4, "
        "n_kv_heads: 2, tie_weight: false, max_len: 1024}",
        "optimizer": "muon",
        "rows": 11,
        "length": 192,
        "steps": 40,
    },
    "100M": {
        "model": "{vocab_size: 16384, dim: 768, n_layers: 12, dim_ffn: 2304, n_heads: 12, "
        "n_kv_heads: 4, max_len: 1024}",
        "optimizer": "adamw",
        "rows": 4,
        "length": 256,
        "steps": 4,
    },
}
PROGRAM = Path(sysconfig.get_path("scripts")) / "astrai-train"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("shapes", nargs="*", default=[], help=", ".join(SHAPES))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--precision", default="32-true", help="trainer.precision")
    options = parser.parse_args()
    print("| run | memory planned | taken | off | tokens/s planned | taken | off |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        world = Path(temporary)
        make_data(world)
        for name in options.shapes or SHAPES:
            rounds = [
                measure(name, world, number, options.precision) for number in range(options.rounds)
            ]
            planned = max(rate for rate, _, _, _ in rounds)
            taken = max(rate for _, rate, _, _ in rounds)
            memory, peak = rounds[0][2], max(peak for _, _, _, peak in rounds)
            print(
                f"| {name} {options.precision} | {memory / 1e9:.2f} GB | {peak / 1e9:.2f} GB "
                f"| {memory / peak - 1:+.0%} | {planned:,.0f} | {taken:,.0f} "
                f"| {planned / taken - 1:+.0%} |",
                flush=True,
            )


def measure(
    name: str, world: Path, number: int, precision: str
) -> tuple[float, float, float, float]:
    """Tokens a second and bytes, planned and taken."""
    shape = SHAPES[name]
    arguments = [
        "--trainer.accelerator=cpu",
        f"--trainer.default_root_dir={world / f'{name}-{number}'}",
        f"--trainer.max_steps={shape['steps']}",
        f"--trainer.precision={precision}",
        "--trainer.log_every_n_steps=1",
        "--trainer.callbacks=Throughput",
        "--trainer.enable_progress_bar=false",
        "--checkpoint.every_minutes=0",
        "--model.class_path=SEQModule",
        f"--model.init_args.model={shape['model']}",
        f"--model.init_args.optimizer.name={shape['optimizer']}",
        "--model.init_args.schedule.warmup_steps=0",
        "--model.init_args.compile=false",
        "--data.class_path=TokenDataModule",
        f"--data.init_args.tokenizer={world / 'tokenizer'}",
        f"--data.init_args.train={world / 'text.txt'}",
        f"--data.init_args.window_size={shape['length']}",
        f"--data.init_args.batch_size={shape['rows']}",
    ]
    plan, _ = run("plan", arguments)
    _, peak = run("fit", arguments)
    with (world / f"{name}-{number}" / "metrics.csv").open() as lines:
        rates = [float(row["train/tokens_per_s"]) for row in csv.DictReader(lines)]
    return figure(plan, "speed"), max(rates[1:]), figure(plan, "memory"), peak


def run(command: str, arguments: list[str]) -> tuple[str, float]:
    """Output and peak memory of a command."""
    process = subprocess.Popen(
        [PROGRAM, command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    text = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{command} failed:\n{text[-2000:]}")
    return text, usage.ru_maxrss * 1024


def figure(plan: str, name: str) -> float:
    found = re.search(rf"^{name} +([\d.,]+) *(\w*)", plan, re.MULTILINE)
    assert found is not None, plan
    units = {"GB": 1e9, "MB": 1e6, "M": 1e6}
    return float(found[1].replace(",", "")) * units.get(found[2], 1)


def make_data(world: Path) -> None:
    from astrai_core.tokenizer import AutoTokenizer

    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 8))) for _ in range(900)]
    lines = [" ".join(draw.choices(words, k=20)) for _ in range(6000)]
    AutoTokenizer.train(lines[:2000], 1024).save_pretrained(world / "tokenizer")
    (world / "text.txt").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
