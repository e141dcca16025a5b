"""What a user gets wrong: one clear line, a status that is not 0, and nothing lost."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from astrai_core.model import AutoModel, ModelConfig
from astrai_core.tokenizer import AutoTokenizer
from astrai_train.cli import main
from astrai_train.data.prepare import prepare

SCRIPTS = Path(sysconfig.get_path("scripts"))
PROGRAM = SCRIPTS / "astrai-train"
ROOT = Path(__file__).parents[2]
TEXTS = [f"{a} plus {b} is {a + b}. 你好，世界！" for a in range(9) for b in range(9)]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """Two tokenizers and a data file of the first, made once."""
    folder = tmp_path_factory.mktemp("bad-input")
    AutoTokenizer.train(TEXTS, 290).save_pretrained(folder / "tokenizer")
    AutoTokenizer.train([text[::-1] for text in TEXTS], 280).save_pretrained(folder / "other")
    records = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (folder / "text.jsonl").write_text(records, encoding="utf-8")
    prepare(
        [folder / "text.jsonl"],
        folder / "text.h5",
        stage="seq",
        tokenizer=folder / "tokenizer",
        workers=1,
    )
    return folder


@pytest.fixture
def config(prepared, tmp_path) -> Path:
    """A run that would work."""
    content = {
        "trainer": {
            "default_root_dir": str(tmp_path / "run"),
            "accelerator": "cpu",
            "max_steps": 2,
            "enable_progress_bar": False,
        },
        "checkpoint": {"every_n_steps": 1},
        "model": {
            "class_path": "SEQModule",
            "init_args": {
                "model": {"vocab_size": 300, "dim": 16, "n_layers": 1, "dim_ffn": 32, "n_heads": 2},
                "compile": False,
                "schedule": {"warmup_steps": 1},
            },
        },
        "data": {
            "class_path": "TokenDataModule",
            "init_args": {
                "tokenizer": str(prepared / "tokenizer"),
                "train": str(prepared / "text.h5"),
                "window_size": 32,
                "batch_size": 2,
            },
        },
    }
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def refusal(capsys, *arguments: str | Path) -> tuple[int, str]:
    """Run a command that must fail, and return its status and its one line."""
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("astrai-train: ")
    assert isinstance(end.value.code, int)
    return end.value.code, lines[0].removeprefix("astrai-train: ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fti"], ["fti is not a command", "did you mean fit?"]),
        (["fit", "--trainr.max_steps", "3"], ["--trainr.max_steps", "did you mean --trainer"]),
        (["fit", "--config", "nowhere.yaml"], ["nowhere.yaml does not exist"]),
        (["fit", "--config"], ["--config needs a file"]),
        (["fit"], ["fit needs a configuration, as --config configs/seq.yaml"]),
        (["fit", "run.yaml"], ["run.yaml needs its option before it: --config run.yaml"]),
    ],
)
def test_a_mistake_is_answered_before_anything_is_loaded(capsys, arguments, words):
    status, line = refusal(capsys, *arguments)
    assert status == 2
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("trainer: {max_steps: [", "is not YAML"),
        ("- trainer", "is not a mapping"),
        ("trainr: {max_steps: 3}", "unknown section trainr; did you mean trainer?"),
        ("model: {clas_path: SEQModule}", "model has clas_path; did you mean class_path?"),
        ("data: {class_path: X, init_arg: {}}", "data has init_arg; did you mean init_args?"),
    ],
)
def test_a_broken_configuration_is_named(capsys, tmp_path, text, words):
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    status, line = refusal(capsys, "fit", "--config", file)
    assert status == 2
    assert words in line
    assert str(file) in line


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--trainer.max_step", "3", ["unknown option --trainer.max_step"]),
        ("--trainer.max_steps", "many", ["--trainer.max_steps must be a whole number, not many"]),
        ("--trainer.precision", "fp3", ["--trainer.precision must be", "bf16-mixed", "not fp3"]),
        ("--model.optimizer.lr", "fast", ["lr must be a number, not fast"]),
        ("--model.model.dimm", "3", ["dimm is not an option of ModelConfig"]),
        ("--model.model.dim", "-1", ["dim must be a positive integer, not -1"]),
        ("--model.model.n_heads", "3", ["dim 16 is not a multiple of n_heads 3"]),
        ("--model.init_from", "runs/x", ["model and init_from", "contradict each other"]),
        ("--model", "SEQModul", ["there is no class SEQModul"]),
        ("--checkpoint.keep", "0", ["checkpoint.keep must be at least 1, not 0"]),
        ("--seed_everything", "true", ["seed_everything must be a whole number"]),
        ("--trainer.strategy", "ddp_spawn", ["trainer.strategy ddp_spawn", "set", "to ddp"]),
        ("--trainer.strategy", "ddp_fork", ["trainer.strategy ddp_fork", "set", "to ddp"]),
    ],
)
def test_an_option_that_cannot_be_is_named(capsys, config, option, value, words):
    status, line = refusal(capsys, "fit", "--config", config, option, value)
    assert status == 2
    assert all(word in line for word in words), line
    assert len(line) < 400


def test_data_of_another_tokenizer_is_refused(capsys, config, prepared):
    option = ("--data.init_args.tokenizer", prepared / "other")
    status, line = refusal(capsys, "fit", "--config", config, *option)
    assert status == 1
    assert "text.h5 was prepared with another tokenizer" in line


def test_a_corrupt_data_file_is_named(capsys, config, prepared, tmp_path):
    broken = tmp_path / "broken.h5"
    content = (prepared / "text.h5").read_bytes()
    broken.write_bytes(content[: len(content) // 2])
    status, line = refusal(capsys, "fit", "--config", config, "--data.init_args.train", broken)
    assert status == 1
    assert "broken.h5 is damaged" in line


def test_a_missing_data_file_is_named(capsys, config):
    status, line = refusal(capsys, "fit", "--config", config, "--data.init_args.train", "no.h5")
    assert status == 1
    assert "no.h5 does not exist" in line


def test_a_checkpoint_that_is_none_is_named(capsys, config, tmp_path):
    (tmp_path / "file").write_bytes(b"weights")
    for name, words in {
        "": "has no config.json: it is not a checkpoint folder; name a checkpoint folder",
        "file": "is a file; name a checkpoint folder",
        "nowhere": "does not exist; name a checkpoint folder",
    }.items():
        option = ("--ckpt_path", tmp_path / name)
        status, line = refusal(capsys, "fit", "--config", config, *option)
        assert status == 2
        assert words in line
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_run_is_told_from_ones_own(capsys, config, tmp_path):
    main(["fit", "--config", str(config)])
    capsys.readouterr()
    run = tmp_path / "run"
    last = (run / "checkpoints" / "last").resolve()
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}

    status, line = refusal(capsys, "fit", "--config", config, "--ckpt_path", run)
    assert (status, line.endswith(f"its newest checkpoint is {last}")) == (2, True)
    option = ("--model.init_args.model.dim_ffn", "48")
    status, line = refusal(capsys, "fit", "--config", config, "--ckpt_path", last, *option)
    assert status == 2
    assert "another architecture than the configuration describes: dim_ffn 32, not 48" in line
    option = ("--model.class_path", "SFTModule")
    status, line = refusal(capsys, "fit", "--config", config, "--ckpt_path", last, *option)
    assert status == 2
    assert "is of a run of SEQModule, with which SFTModule cannot go on" in line
    assert f"--model.init_args.init_from {last}" in line
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before


def test_an_earlier_run_stays_until_the_fresh_one_begins(capsys, config, tmp_path):
    main(["fit", "--config", str(config)])
    run = tmp_path / "run"
    capsys.readouterr()
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    for option in (("--data.init_args.train", "no.h5"), ("--checkpoint.keep", "0")):
        refusal(capsys, "fit", "--config", config, "--fresh", *option)
        assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before
    main(["fit", "--config", str(config), "--fresh"])
    assert "starts" in capsys.readouterr().out
    aside = run / "earlier-1" / "checkpoints" / "step-00000002" / "model.safetensors"
    assert aside.read_bytes() == before[run / aside.relative_to(run / "earlier-1")]


def test_rows_longer_than_the_context_are_refused(capsys, config):
    option = ("--data.init_args.window_size", "4096")
    status, line = refusal(capsys, "fit", "--config", config, *option)
    assert status == 2
    assert "data.window_size 4096 exceeds the model's max_len 2048" in line


def test_a_model_beyond_all_memory_is_refused_before_it_is_made(capsys, config, tmp_path):
    size = {"dim": 16384, "n_layers": 96, "dim_ffn": 49152}
    options = [f"--model.init_args.model.{name}={value}" for name, value in size.items()]
    status, line = refusal(capsys, "fit", "--config", config, *options)
    assert status == 1
    assert "weights, gradients and optimizer of its 335,017,099,264 parameters take" in line
    assert not (tmp_path / "run").exists()


def test_weights_alone_are_no_run_to_go_on_with(capsys, config, prepared, tmp_path):
    shape = ModelConfig(vocab_size=300, dim=16, n_layers=1, dim_ffn=32, n_heads=2)
    AutoModel.save_pretrained(AutoModel.from_config(shape), tmp_path / "model")
    option = ("--ckpt_path", tmp_path / "model")
    status, line = refusal(capsys, "fit", "--config", config, *option)
    assert status == 2
    assert "use --model.init_args.init_from" in line
    options = ("--data.init_args.val", str(prepared / "text.h5"))
    main(["validate", "--config", str(config), "--ckpt_path", str(tmp_path / "model"), *options])
    assert "weights of" in capsys.readouterr().out


def test_a_full_disk_leaves_the_last_checkpoint_whole(config, tmp_path):
    main(["fit", "--config", str(config)])
    checkpoints = tmp_path / "run" / "checkpoints"
    before = {file: file.read_bytes() for file in checkpoints.rglob("*") if file.is_file()}
    largest = max(map(len, before.values()))

    full = subprocess.run(
        [PROGRAM, "fit", "--config", config, "--trainer.max_steps", "5"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (largest // 2, -1)),
        capture_output=True,
        text=True,
        timeout=240,
    )

    (line,) = full.stderr.splitlines()
    assert full.returncode == 1
    assert "cannot write the checkpoint" in line
    assert "step-00000002 is whole: free some space and run the same command again" in line
    assert {file: file.read_bytes() for file in checkpoints.rglob("*") if file.is_file()} == before
    main(["fit", "--config", str(config), "--trainer.max_steps", "3"])
    assert (checkpoints / "last").resolve().name == "step-00000003"


@pytest.mark.slow
def test_a_full_file_system_is_no_different(config, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=320k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a file system")
    try:
        command = [PROGRAM, "fit", "--config", config, "--trainer.max_steps", "50"]
        options = ["--trainer.default_root_dir", disk / "run", "--checkpoint.keep", "50"]
        full = subprocess.run([*command, *options], capture_output=True, text=True, timeout=240)
        (line,) = full.stderr.splitlines()
        assert full.returncode == 1
        assert "No space left on device" in line
        root = disk / "run" / "checkpoints"
        assert not list(root.glob(".tmp-*"))
        shutil.copytree((root / "last").resolve(), tmp_path / "last")
        main(["validate", "--config", str(config), "--ckpt_path", str(tmp_path / "last")])
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def answer(*command: str | Path, **environment: str) -> tuple[int, str]:
    """Run a real command, and return its status and all that it said on its error stream."""
    done = subprocess.run(
        [SCRIPTS / command[0], *command[1:]],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )
    return done.returncode, done.stderr


@pytest.fixture(scope="module")
def model(prepared) -> Path:
    """A model folder with its tokenizer."""
    shape = ModelConfig(vocab_size=300, dim=16, n_layers=1, dim_ffn=32, n_heads=2)
    AutoModel.save_pretrained(AutoModel.from_config(shape), prepared / "model")
    AutoTokenizer.from_pretrained(prepared / "tokenizer").save_pretrained(prepared / "model")
    return prepared / "model"


def test_a_context_beyond_the_models_own_is_refused(model):
    status, line = answer("astrai-serve", "--model", model, "--port", "0", "--max_context", "4096")
    assert status == 1
    assert "max_context 4096 exceeds the model's max_len 2048: lower it" in line


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    """The Python of an environment to which no extra was installed."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    packages = Path(sysconfig.get_path("purelib"))
    (there,) = folder.glob("lib/python*/site-packages")
    for one in packages.iterdir():
        if one.name not in ("lightning", "h5py", "rich", "fastapi", "uvicorn", "gguf"):
            (there / one.name).symlink_to(one)
    return folder / "bin" / "python"


@pytest.mark.parametrize(
    ("module", "arguments", "extra"),
    [
        ("astrai_train.cli", "fit --config {config}", "train"),
        ("astrai_train.cli", "plan --config {config}", "train"),
        ("astrai_train.cli", "compare {model} {model}", "train"),
        ("astrai_train.data.cli", "inspect {model}/../text.jsonl --tokenizer {model}", "train"),
        ("astrai_serve.cli", "--model {model} --port 0", "serve"),
        ("astrai_serve.batch", "--model {model} --input {config} --output o.jsonl", "serve"),
        ("astrai_core.cli", "export {model} --format gguf --out o.gguf", "export"),
    ],
)
def test_a_missing_extra_is_named(bare, model, config, tmp_path, module, arguments, extra):
    given = arguments.format(config=config, model=model).split()
    code = f"from {module} import main; main({given!r})"
    done = subprocess.run([bare, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1
    assert line.startswith("astrai-")
    assert line.endswith(f"pip install 'astrai[{extra}]'")


@pytest.mark.parametrize("compiler", ["/nonexistent", "/bin/false"])
def test_training_without_a_compiler_is_slower_and_says_so(config, tmp_path, compiler):
    options = ("--model.init_args.compile", "null")
    done = subprocess.run(
        [PROGRAM, "fit", "--config", config, *options],
        env=os.environ | {"CXX": compiler, "XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    (line,) = re.findall("training runs uncompiled: .*", done.stdout)
    assert compiler in line
    assert line.endswith("install g++ for full speed")


@pytest.mark.parametrize("compiler", ["/nonexistent", "/bin/false"])
def test_a_server_without_a_compiler_is_slower_and_says_so(model, tmp_path, compiler):
    process = subprocess.Popen(
        [SCRIPTS / "astrai-serve", "--model", model, "--port", "0"],
        env=os.environ | {"CXX": compiler, "XDG_CACHE_HOME": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if line.split()[:1] == ["address"]:
            process.send_signal(signal.SIGINT)
    process.stdout.close()
    assert process.wait(60) == 0
    (line,) = [line for line in said if line.split()[:1] == ["slower"]]
    assert compiler in line
    assert "install g++ for full speed" in line


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A file system of 100 kB, of which 4 are free."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a file system")
    (folder / "full").write_bytes(bytes(96 * 1024))
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize(
    "command",
    [
        "astrai-model quantize {model} --out {disk}/out",
        "astrai-model export {model} --format hf --out {disk}/out",
        "astrai-model export {model} --format gguf --out {disk}/out.gguf",
        "astrai-data prepare --stage seq --tokenizer {model} --input {text} --out {disk}/out.h5",
        "astrai-data tokenizer --input {text} --out {disk}/out --vocab_size 280",
    ],
)
def test_a_full_disk_leaves_nothing_that_looks_whole(disk, model, prepared, command):
    given = command.format(model=model, disk=disk, text=prepared / "text.jsonl").split()
    status, said = answer(*given)
    line = said.splitlines()[-1]
    assert status == 1
    assert "No space left on device; free some space and run the same command again" in line
    assert len(line) < 250
    whole = {"tokenizer.json", "config.json", "model.safetensors", "out.gguf", "out.h5"}
    left = {path.name for path in disk.rglob("*")}
    assert not left & whole
    assert not [name for name in left if name.startswith(".tmp-")]


def test_a_model_too_large_for_memory_says_so(config):
    size = {"dim": 2048, "n_layers": 12, "dim_ffn": 8192}
    options = [f"--model.init_args.model.{name}={value}" for name, value in size.items()]
    done = subprocess.run(
        [PROGRAM, "fit", "--config", config, *options],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (2_000_000_000, -1)),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    # the system refuses, or we do where the machine has less memory than the run would take
    assert "the model does not fit into memory" in line
    assert "astrai-train plan tells what fits" in line


def test_a_file_where_a_folder_should_be_is_named(config, prepared, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for command in (
        ("astrai-train", "fit", "--config", config, "--trainer.default_root_dir", file),
        ("astrai-data", "tokenizer", "--input", prepared / "text.jsonl", "--out", file),
        ("astrai-data", "curriculum", "--out", file),
    ):
        status, line = answer(*command)
        assert status == 1
        assert str(file) in line
        assert "Errno" not in line
        assert "name a folder" in line or "choose another place" in line


def test_a_quantised_folder_is_not_exported(model, tmp_path):
    assert answer("astrai-model", "quantize", model, "--out", tmp_path / "q") == (0, "")
    for options in (("--format", "hf"), ("--format", "gguf")):
        given = ("export", tmp_path / "q", *options, "--out", tmp_path / "out")
        status, line = answer("astrai-model", *given)
        assert status == 1
        assert "holds w8a8 weights, which only AstrAI reads; export the folder" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("python", "words"),
    [
        ("/nowhere/python3", "install Python 3.11"),
        ("{fake}", "Python 3.11 or newer is needed and {fake} is 3.9"),
    ],
)
def test_make_names_a_python_that_will_not_do(tmp_path, python, words):
    fake = tmp_path / "python3.9"
    fake.write_text(
        f"""#!/bin/sh
exec {sys.executable} -c "import sys; sys.version_info = (3, 9, 18); exec(sys.argv[1])" "$2"
"""
    )
    fake.chmod(0o755)
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    given = ["make", "demo", f"PYTHON={python.format(fake=fake)}"]
    done = subprocess.run(given, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert words.format(fake=fake) in done.stderr
    assert not (tmp_path / ".venv").exists()
