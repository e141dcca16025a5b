"""What a tiny run of each objective trains on: a new one adds a function here and nothing else."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

MOMENTS = ("batch", "window", "validation", "epoch", "checkpoint")
"""Where every run can be killed, see `interruption`."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The data and the options of a run."""

    records: list[dict[str, Any]]
    model: dict[str, Any] = field(default_factory=dict)
    """Options of the module; without `model` it starts from the folder that all share."""
    data: dict[str, Any] = field(default_factory=dict)
    """Options of the data module."""
    checkpoint: dict[str, Any] = field(default_factory=dict)
    """When to save, where that is not after every second step."""
    moments: tuple[str, ...] = MOMENTS


def seq() -> Objective:
    """Pre-training of a new model, with smoothed labels."""
    texts = [f"{a} plus {b} is {a + b}. 你好，世界！" for a in range(9) for b in range(9)]
    shape = {"vocab_size": 290, "dim": 16, "n_layers": 1, "dim_ffn": 32, "n_heads": 2}
    return Objective(
        records=[{"text": text} for text in texts], model={"model": shape, "label_smoothing": 0.05}
    )


def sft() -> Objective:
    """Instruction tuning."""
    messages = [
        [
            {"role": "user", "content": f"{a}+{a}?"},
            {"role": "assistant", "content": f"{2 * a}, 你好"},
        ]
        for a in range(60)
    ]
    return Objective(records=[{"messages": one} for one in messages])


def dpo() -> Objective:
    """Preferences, with a reference that is computed first."""
    records = [
        {"prompt": f"{a}+{a}?", "chosen": f"{2 * a}, 你好", "rejected": "no" * (a % 3 + 1)}
        for a in range(60)
    ]
    return Objective(records=records)


def grpo() -> Objective:
    """Rewards for answers of the serving engine, 60 prompts."""
    model = {
        "engine": {
            "class_path": "astrai_serve.LLM",
            "init_args": {"config": {"max_running_tasks": 8, "max_step_tokens": 64}},
        },
        "rewards": ["objectives.vowels"],
        "rollout": {"num_generations": 3, "max_completion": 6},
    }
    records = [{"prompt": f"{a}+{a}?"} for a in range(60)]
    return Objective(records=records, model=model, moments=(*MOMENTS, "rollout"))


def sft_lora() -> Objective:
    """Instruction tuning of adapters alone, with a dropout that draws random numbers."""
    lora = {"rank": 4, "dropout": 0.1}
    return replace(sft(), model={"lora": lora})


def grpo_updates() -> Objective:
    """Rollouts of two optimizer steps that are gone over twice, saved after each step.

    In an epoch of seven steps the first rollout has four of them and the second is cut off.
    """
    given = grpo()
    model = given.model | {
        "micro_batches": 4,
        "updates": 2,
        "policy": {"kl": "k3", "kl_weight": 0.1},
    }
    return replace(given, model=model, checkpoint={"every_n_steps": 1})


def vowels(completions: list[Any], **columns: Any) -> list[float | None]:
    """A reward that differs between answers of chance."""
    return [float(sum(str(one).count(letter) for letter in "aeiou0123")) for one in completions]


OBJECTIVES: dict[str, Callable[[], Objective]] = {
    "SEQ": seq,
    "SFT": sft,
    "DPO": dpo,
    "GRPO": grpo,
    "SFT-LoRA": sft_lora,
    "GRPO-updates": grpo_updates,
}
"""By the name of their module, and of what is special about them."""
