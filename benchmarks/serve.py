"""How fast is the server, beside its peers? Real processes, the same prompts, one table a model.

`astrai-serve` is started as a user starts it, on a folder quantised beforehand; peers are those
found in a folder of virtual environments, as `serving/peers.py` says. Speed does not depend on the
values of the weights, so the models may be random. Servers take turns, round after round, and each
figure is the median of its rounds.

    python -m benchmarks.serve --models DIR --peers DIR
    python -m benchmarks.serve --models DIR --sizes S --workloads single,prefill --rounds 3
"""

import argparse
import json
import os
import platform
import re
import sys
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.serving.check import check
from benchmarks.serving.limits import limits
from benchmarks.serving.peers import measure_ours, peers_of
from benchmarks.serving.table import OURS, merged, table
from benchmarks.serving.workloads import WORKLOADS


def machine() -> dict:
    """What the figures depend on beside the code."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = re.search(r"model name\s*: (.*)", text)
    flags = re.search(r"flags\s*: (.*)", text)
    known = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8")
    return {
        "cpu": name[1] if name else platform.processor() or platform.machine(),
        "flags": " ".join(flag for flag in known if flags and flag in flags[1].split()),
        "cores": _cores(),
        "load": [round(one, 1) for one in os.getloadavg()],
        "python": platform.python_version(),
        "torch": version("torch"),
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path, required=True, help="folder of models")
    parser.add_argument("--sizes", default="S,L", help="models in it, separated by commas")
    parser.add_argument(
        "--peers", type=Path, default=os.environ.get("ASTRAI_PEERS"), help="folder of environments"
    )
    parser.add_argument("--only", default="", help="part of a column's name; empty is all")
    parser.add_argument("--workloads", default=",".join(WORKLOADS), help="separated by commas")
    parser.add_argument("--rounds", type=int, default=1, help="rounds whose median is taken")
    parser.add_argument("--serve", default="", help="more options of astrai-serve")
    parser.add_argument("--out", type=Path, help="append one JSON line for each model")
    given = parser.parse_args()
    given.workloads = given.workloads.split(",")
    if wrong := [one for one in given.workloads if one not in WORKLOADS]:
        parser.error(f"--workloads: {wrong[0]!r} is not one of {', '.join(WORKLOADS)}")
    if given.rounds < 1:
        parser.error(f"--rounds must be at least 1, not {given.rounds}")
    return given


def main() -> None:
    """Measure each model on every server there is."""
    given = options()
    about, is_right = machine(), True
    print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    for size in given.sizes.split(","):
        config = json.loads((given.models / size / "config.json").read_text())
        ours = given.models / f"{size}-w8a8"
        servers = {OURS: partial(measure_ours, ours, config["vocab_size"], given.serve.split())}
        if given.peers:
            servers |= peers_of(Path(given.peers), given.models, size, _cores())
        servers = {name: one for name, one in servers.items() if given.only in name or name == OURS}
        bounds = limits()
        rounds: dict[str, list[dict]] = {name: [] for name in servers}
        for number in range(given.rounds):
            for name, server in servers.items():
                try:
                    rounds[name].append(server(given.workloads, number))
                except RuntimeError as error:
                    print(f"{name}: {error}", flush=True)
        if not rounds[OURS]:
            sys.exit(f"{size}: nothing to compare, for {OURS} did not run")
        answers = rounds[OURS][0].pop("answers")
        columns = {name: merged(results) for name, results in rounds.items() if results}
        parameters = _num_parameters(ours)
        print(f"\n{size}: {parameters:,} parameters; {json.dumps(bounds)}")
        try:
            verdict = check(ours, answers)
        except RuntimeError as error:
            verdict, is_right = f"WRONG: {error}", False
        print(f"greedy tokens: {verdict}")
        print(table(columns, parameters, bounds), flush=True)
        if given.out:
            line = {"size": size, "rounds": given.rounds, **about, **bounds, "columns": columns}
            with given.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
    if not is_right:
        raise SystemExit("the answers are not the model's")


def _num_parameters(folder: Path) -> int:
    from astrai_serve.model_source import ModelSource

    return ModelSource.find(folder, "auto", is_random=False).num_parameters


if __name__ == "__main__":
    main()
