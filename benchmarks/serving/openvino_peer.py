"""Run by the peer's own Python: OpenVINO GenAI's continuous batching, step by step."""

import json
import re
import sys
import time
from pathlib import Path

import numpy as np
import openvino as ov  # pyright: ignore[reportMissingImports] - the peer's environment has it
import openvino_genai as og  # pyright: ignore[reportMissingImports]


def peak_memory_mb() -> float:
    """Most memory of this process; `getrusage` would tell of the one that started it, too."""
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None, "this system does not tell"
    return int(found[1]) / 1024


def serve(
    pipe: og.ContinuousBatchingPipeline, work: dict, first_id: int
) -> tuple[list[dict], float]:
    """Keep so many requests under way, and note when each token came."""
    config = og.GenerationConfig()
    config.max_new_tokens = config.min_new_tokens = work["num_new"]
    config.ignore_eos, config.do_sample = True, False
    waiting, live, answers = list(enumerate(work["prompts"])), {}, {}
    began = time.perf_counter()
    while waiting or live:
        while waiting and len(live) < work["concurrency"]:
            number, prompt = waiting.pop(0)
            tokens = ov.Tensor(np.array([prompt], dtype=np.int64))
            answers[number] = {"sent": time.perf_counter(), "num_prompt": len(prompt)}
            answers[number] |= {"first": 0.0, "last": 0.0, "num_tokens": 0}
            live[number] = pipe.add_request(first_id + number, tokens, config)
        pipe.step()
        now = time.perf_counter()
        for number, handle in list(live.items()):
            while handle.can_read():
                answer = answers[number]
                answer["num_tokens"] += sum(len(o.generated_ids) for o in handle.read().values())
                answer["first"], answer["last"] = answer["first"] or now, now
            if handle.get_status() != og.GenerationStatus.RUNNING:
                del live[number]
    return list(answers.values()), time.perf_counter() - began


def main() -> None:
    model, plan, threads = sys.argv[1:]
    began = time.perf_counter()
    scheduler = og.SchedulerConfig()
    scheduler.cache_size, scheduler.max_num_seqs = 2, 32
    scheduler.max_num_batched_tokens, scheduler.dynamic_split_fuse = 512, True
    scheduler.enable_prefix_caching = True
    best: dict = {}
    for precision in ("bf16", "f32"):  # the better of both counts
        pipe = og.ContinuousBatchingPipeline(
            model, scheduler, "CPU",
            {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": int(threads)},
        )  # fmt: skip
        for number, (name, work) in enumerate(json.loads(Path(plan).read_text()).items()):
            answers, seconds = serve(pipe, work, 10_000 * number)
            if name == "warm":
                first = min(answer["first"] for answer in answers) - began
                best.setdefault("first_answer_seconds", first)
            elif name not in best or seconds < best[name]["seconds"]:
                best[name] = {"answers": answers, "seconds": seconds, "precision": precision}
        del pipe
        peak = peak_memory_mb()
        best.setdefault("peak_memory_mb", peak)  # of the first alone
    print(json.dumps(best))


if __name__ == "__main__":
    main()
