"""Run by the peer's own Python: transformers' `generate`, a padded batch of requests at a time."""

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM


class Clock:
    """A logits processor that notes when each step's logits are there."""

    def __init__(self):
        self.times: list[float] = []

    def __call__(self, _ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return scores


def peak_memory_mb() -> float:
    """Most memory of this process; `getrusage` would tell of the one that started it, too."""
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None, "this system does not tell"
    return int(found[1]) / 1024


def serve(model: Any, work: dict) -> tuple[list[dict], float]:
    """Answer batch after batch."""
    answers, began, prompts = [], time.perf_counter(), work["prompts"]
    for start in range(0, len(prompts), work["concurrency"]):
        batch = prompts[start : start + work["concurrency"]]
        width = max(map(len, batch))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in batch])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch])
        clock, sent = Clock(), time.perf_counter()
        model.generate(
            ids, attention_mask=mask, do_sample=False, logits_processor=[clock],
            min_new_tokens=work["num_new"], max_new_tokens=work["num_new"],
        )  # fmt: skip
        answers += [
            {"sent": sent if work["concurrency"] == 1 else began, "num_prompt": len(prompt)}
            | {"first": clock.times[0], "last": clock.times[-1], "num_tokens": work["num_new"]}
            for prompt in batch
        ]
    return answers, time.perf_counter() - began


def main() -> None:
    folder, plan, threads = sys.argv[1:]
    began = time.perf_counter()
    torch.set_num_threads(int(threads))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = None
    results: dict = {}
    for name, work in json.loads(Path(plan).read_text()).items():
        answers, seconds = serve(model, work)
        if name == "warm":
            results["first_answer_seconds"] = min(a["first"] for a in answers) - began
        else:
            results[name] = {"answers": answers, "seconds": seconds}
    results["peak_memory_mb"] = peak_memory_mb()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
