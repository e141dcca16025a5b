"""How fast is training? The same model and data here, in HF Trainer and in TRL, side by side.

A random Qwen3-shaped model of 52.6M parameters is written once and trained by every contender in a
process of its own, in turn; a contender's figure is the median step of its best round, the first
step left out. Text is random words of ragged length. Where the processor computes bfloat16 all use
it, else all use float32. Tokens are those of the data, padding not counted; in grpo a step is 4
prompts with 8 completions each, and what counts is its time, rollout included.

    python benchmarks/train.py                     every objective, what is installed
    python benchmarks/train.py seq sft --rounds 3
    python benchmarks/train.py --size 4M --steps 4 seq

TRL as it comes recomputes activations (gradient checkpointing). The peak is that of products of
square matrices of 2,048 rows, the best of many before and after each objective. Each turn is told
on standard error as it ends.
"""

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

SIZES: dict[str, dict[str, Any]] = {
    "53M": {"hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8}
    | {"num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 1536, "vocab_size": 32000},
    "4M": {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    | {"num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 384, "vocab_size": 8000},
}
OBJECTIVES = ("seq", "sft", "dpo", "grpo")
ROWS, LENGTH = 4, 512
SAMPLES = 8
PROMPTS, COMPLETIONS, NEW_TOKENS = 4, 8, 128
CONTENDERS = {
    "seq": ("ours", "ours eager", "hf", "hf compiled"),
    "sft": ("ours", "trl", "trl no checkpointing"),
    "dpo": ("ours", "trl", "trl no checkpointing"),
    "grpo": ("ours", "ours w8a8", "trl", "trl no checkpointing"),
}
Seconds = list[float]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("objectives", nargs="*", default=[], help=", ".join(OBJECTIVES))
    parser.add_argument("--size", choices=SIZES, default="53M")
    parser.add_argument("--steps", type=int, default=4, help="steps of each contender and round")
    parser.add_argument(
        "--rounds", type=int, default=2, help="how often each contender has its turn"
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help="where models and data are made and kept")
    options = parser.parse_args()
    # a time limit's signal must reach `run_apart`, which ends its child
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if options.contender:
        objective, _, name = options.contender.partition(":")
        print(json.dumps(run_here(objective, name, options)))
        return
    unknown = set(options.objectives) - set(OBJECTIVES)
    if unknown:
        parser.error(
            f"no objective {', '.join(sorted(unknown))}; there are {', '.join(OBJECTIVES)}"
        )
    with tempfile.TemporaryDirectory() as temporary:
        options.folder = options.folder or Path(temporary)
        make_world(options.folder, options.size)
        compare(options.objectives or list(OBJECTIVES), options)


def compare(objectives: Sequence[str], options: argparse.Namespace) -> None:
    peak = gemm_peak(options.threads)
    print(
        f"{options.size}, {options.threads} threads, {dtype()}, matrix products at most "
        f"{peak / 1e9:.0f} GFLOP/s; {processor()}; torch {torch.__version__}, "
        + ", ".join(
            f"{name} {version(name)}" for name in ("transformers", "trl") if find_spec(name)
        ),
        flush=True,
    )
    print("| objective | contender | step | tokens/s | ours is | of the peak | memory |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for objective in objectives:
        results: dict[str, dict[str, Any]] = {}
        for _ in range(options.rounds):
            for name in CONTENDERS[objective]:
                package = {"hf": "transformers", "trl": "trl"}.get(name.split()[0])
                if package and not find_spec(package):
                    continue
                result = run_apart(objective, name, options)
                told = f"{result['seconds']:.2f} s, {result['memory'] / 1e9:.2f} GB"
                print(f"{objective} {name}: {told}", file=sys.stderr, flush=True)
                before = results.get(name)
                if before is None or result["seconds"] < before["seconds"]:
                    results[name] = result
        peak = max(peak, gemm_peak(options.threads))
        ours = results["ours"]
        for name, result in results.items():
            share = result.get("operations", 0) / result["seconds"] / peak
            rate, our_rate = (one["tokens"] / one["seconds"] for one in (result, ours))
            ratio = result["seconds"] / ours["seconds"] if objective == "grpo" else our_rate / rate
            print(
                f"| {objective} | {name} | {result['seconds']:.2f} s | {rate:,.0f} | {ratio:.2f}x "
                f"| {f'{share:.0%}' if share else ''} | {result['memory'] / 1e9:.2f} GB |",
                flush=True,
            )


def run_apart(objective: str, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one contender in a process of its own, so that its memory is its own."""
    command = [sys.executable, __file__, "--contender", f"{objective}:{name}"]
    for option in ("size", "steps", "threads", "folder"):
        command += [f"--{option}", str(getattr(options, option))]
    quiet = {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(options.threads),
    }
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | quiet
    )
    try:
        out, errors = process.communicate()
    finally:
        process.kill()  # where this one is interrupted; one that has ended is left alone
        process.wait()
    if process.returncode:
        raise SystemExit(f"{objective} {name} failed:\n{errors[-3000:]}")
    return json.loads(out.splitlines()[-1])


def run_here(objective: str, name: str, options: argparse.Namespace) -> dict[str, Any]:
    import resource

    torch.set_num_threads(options.threads)
    run = {"ours": run_ours, "hf": run_hf, "trl": run_trl}[name.split()[0]]
    moments, tokens = run(objective, name, options.folder, options.steps)
    # the first step is a warm-up, and compiles
    result: dict[str, Any] = {
        "seconds": median(after - before for before, after in pairwise(moments)),
        "tokens": tokens,
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    if objective == "seq":
        shape = SIZES[options.size]
        width = shape["num_attention_heads"] * shape["head_dim"]
        parameters = json.loads((options.folder / "facts.json").read_text())["parameters"]
        # a causal row meets half of its own tokens, forward once and backward twice
        attention = 6 * shape["num_hidden_layers"] * width * LENGTH
        result["operations"] = tokens * (6 * parameters + attention)
    return result


def run_ours(objective: str, name: str, folder: Path, steps: int) -> tuple[Seconds, float]:
    """`astrai-train fit`, as a user runs it."""
    import contextlib
    import io

    from lightning.pytorch.callbacks import Callback

    from astrai_train.run import Run

    moments: Seconds = []

    class Clock(Callback):
        def on_train_batch_end(
            self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            del trainer, pl_module, outputs, batch, batch_idx
            moments.append(time.perf_counter())

    module = {"seq": "SEQModule", "sft": "SFTModule", "dpo": "DPOModule", "grpo": "GRPOModule"}
    arguments = {
        "trainer.default_root_dir": folder / f"run-{objective}-{os.getpid()}",
        "trainer.accelerator": "cpu",
        "trainer.max_steps": steps + 1,
        "trainer.precision": "bf16-mixed" if dtype() == "bfloat16" else "32-true",
        "trainer.enable_progress_bar": "false",
        "trainer.logger": "false",
        "checkpoint.every_minutes": 0,
        "model.class_path": module[objective],
        "model.init_args.init_from": folder / "model",
        "model.init_args.optimizer.lr": 1e-5,
        "model.init_args.compile": "false" if "eager" in name else "auto",
        "data.class_path": "TokenDataModule",
        "data.init_args.tokenizer": folder / "model",
        "data.init_args.train": folder / f"{objective}.jsonl",
        "data.init_args.stage": objective,
        "data.init_args.window_size": LENGTH,
        "data.init_args.batch_size": {"seq": ROWS, "dpo": SAMPLES, "grpo": PROMPTS}.get(
            objective, ROWS
        ),
    }
    if objective == "grpo":
        arguments |= {
            "model.init_args.engine.class_path": "astrai_serve.LLM",
            "model.init_args.rewards": '["benchmark_rewards.length"]',
            "model.init_args.rollout.num_generations": COMPLETIONS,
            "model.init_args.rollout.max_completion": NEW_TOKENS,
        }
        if "w8a8" in name:
            arguments["model.init_args.rollout.weights"] = "w8a8"
        sys.path.insert(0, str(folder))
    with contextlib.redirect_stdout(io.StringIO()):
        run = Run(["fit", *(f"--{key}={value}" for key, value in arguments.items())])
        run.trainer.callbacks.append(Clock())  # pyright: ignore[reportAttributeAccessIssue]
        tokens = counted(run.model)
        run.execute()
    return moments, tokens()


def counted(module: Any) -> Callable[[], float]:
    """Count the tokens of the batches after the first that are no padding: mean of a batch."""
    seen: list[int] = []
    loss = module.loss

    def counting(batch: Any) -> Any:
        if "document_ids" in batch:
            seen.append(int((batch["document_ids"] >= 0).sum()))
        return loss(batch)

    module.loss = counting
    return lambda: sum(seen[1:]) / max(1, len(seen) - 1)


def run_hf(objective: str, name: str, folder: Path, steps: int) -> tuple[Seconds, float]:
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    assert objective == "seq"
    draw = torch.Generator().manual_seed(0)
    vocabulary = json.loads((folder / "model/config.json").read_text())["vocab_size"]
    rows = torch.randint(300, vocabulary, (ROWS * (steps + 1), LENGTH), generator=draw)
    data = [{"input_ids": row, "labels": row} for row in rows]
    arguments = TrainingArguments(
        **common(folder, steps), per_device_train_batch_size=ROWS, torch_compile="compiled" in name
    )
    clock = hf_clock()
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    Trainer(model=model, args=arguments, train_dataset=data, callbacks=[clock]).train()  # pyright: ignore[reportArgumentType]
    return clock.moments, ROWS * LENGTH


def run_trl(objective: str, name: str, folder: Path, steps: int) -> tuple[Seconds, float]:
    import trl as library
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trl: Any = library  # it hides its classes from type checkers
    lines = (folder / f"{objective}.jsonl").read_text().splitlines()
    data = Dataset.from_list([json.loads(line) for line in lines])
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    settings = common(folder, steps)
    if "no checkpointing" in name:
        settings["gradient_checkpointing"] = False
    clock = hf_clock()
    shared: dict[str, Any] = {
        "train_dataset": data,
        "processing_class": tokenizer,
        "callbacks": [clock],
    }
    if objective == "sft":
        arguments = trl.SFTConfig(
            **settings, per_device_train_batch_size=SAMPLES, max_length=LENGTH
        )
        trainer = trl.SFTTrainer(model, args=arguments, **shared)
    elif objective == "dpo":
        arguments = trl.DPOConfig(**settings, per_device_train_batch_size=SAMPLES)
        trainer = trl.DPOTrainer(model, args=arguments, **shared)
    else:
        sys.path.insert(0, str(folder))
        from benchmark_rewards import length  # pyright: ignore[reportMissingImports]

        arguments = trl.GRPOConfig(
            **settings,
            per_device_train_batch_size=PROMPTS * COMPLETIONS,
            num_generations=COMPLETIONS,
            max_completion_length=NEW_TOKENS,
        )
        trainer = trl.GRPOTrainer(model, reward_funcs=length, args=arguments, **shared)
    trainer.train()
    return clock.moments, mean_tokens(objective, data, tokenizer)


def mean_tokens(objective: str, data: Any, tokenizer: Any) -> float:
    """Tokens of a step, on average over the data."""
    parts = {"sft": ("prompt", "completion"), "dpo": ("prompt", "prompt", "chosen", "rejected")}
    total = sum(
        len(tokenizer(record[part])["input_ids"])
        for record in data
        for part in parts.get(objective, ())
    )
    return SAMPLES * total / len(data)


def common(folder: Path, steps: int) -> dict[str, Any]:
    return {
        "output_dir": str(folder / f"peer-{os.getpid()}"),
        "max_steps": steps + 1,
        "use_cpu": True,
        "bf16": dtype() == "bfloat16",
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "learning_rate": 1e-5,
    }


def hf_clock() -> Any:
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.moments: Seconds = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.moments.append(time.perf_counter())

    return Clock()


def make_world(folder: Path, size: str) -> None:
    """The model, its tokenizer and the data of each objective; what is there stays."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"size": size, "version": 2}
    done = folder / "facts.json"
    if done.is_file() and facts.items() <= json.loads(done.read_text()).items():
        return
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from astrai_core.tokenizer import AutoTokenizer

    draw = random.Random(0)
    words = [
        "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9)))
        for _ in range(2000)
    ]
    text = [" ".join(draw.choices(words, k=200)) for _ in range(800)]
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(**SIZES[size], tie_word_embeddings=True, max_position_embeddings=4096)
    )
    model.save_pretrained(folder / "model")
    AutoTokenizer.train(text, min(8000, SIZES[size]["vocab_size"])).save_pretrained(
        folder / "model"
    )
    facts["parameters"] = sum(weight.numel() for weight in model.parameters())

    def words_of(least: int, most: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(least, most)))

    def write(name: str, record: Callable[[], dict[str, str]], count: int) -> None:
        lines = "".join(json.dumps(record()) + "\n" for _ in range(count))
        (folder / f"{name}.jsonl").write_text(lines)

    write("seq", lambda: {"text": words_of(200, 800)}, 200)
    write("sft", lambda: {"prompt": words_of(8, 120), "completion": " " + words_of(8, 200)}, 256)
    write(
        "dpo",
        lambda: (
            {"prompt": words_of(8, 120)}
            | {name: " " + words_of(8, 200) for name in ("chosen", "rejected")}
        ),
        128,
    )
    write("grpo", lambda: {"prompt": words_of(8, 60)}, 64)
    reward = "def length(completions, **_):\n"
    reward += "    return [float(len(str(one)) % 7) for one in completions]\n"
    (folder / "benchmark_rewards.py").write_text(reward)
    done.write_text(json.dumps(facts))


def gemm_peak(threads: int) -> float:
    """Operations a second of the best of several matrix products."""
    torch.set_num_threads(threads)
    kind = getattr(torch, dtype())
    a, b = torch.randn(2048, 2048).to(kind), torch.randn(2048, 2048).to(kind)
    best = float("inf")
    for _ in range(12):
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * 2048**3 / best


def dtype() -> str:
    info = Path("/proc/cpuinfo")
    flags = info.read_text() if info.is_file() else ""
    return "bfloat16" if "avx512_bf16" in flags or "amx_bf16" in flags else "float32"


def processor() -> str:
    from astrai_train.report.machine import machine

    return machine()["processor"] or platform.machine()


if __name__ == "__main__":
    main()
