"""Every command of README and docs does what it says, in a small world made for it.

What takes a second is run in the quick form, in the order in which one needs the other; commands
that train or serve have their options read there, and are run in the slow form.
"""

import re
import shlex
import shutil
import signal
import subprocess
import sysconfig
from pathlib import Path

import pytest

from astrai_core.cli import main as model_main
from astrai_core.command_line import parse, parse_one
from astrai_core.model import AutoModel, ModelConfig
from astrai_core.tokenizer import AutoTokenizer
from astrai_serve.batch import BatchOptions
from astrai_serve.chat.options import ChatOptions
from astrai_serve.cli import ServeOptions
from astrai_serve.engine import EngineConfig
from astrai_train.cli import check
from astrai_train.data.cli import main as data_main

ROOT = Path(__file__).parents[2]
SCRIPTS = Path(sysconfig.get_path("scripts"))
PAGES = [*ROOT.glob("README*.md"), *sorted((ROOT / "docs").rglob("*.md"))]
COMMAND = re.compile(r"\s*(?:\S*\w\$ )?((?:astrai-\w+|make|python) .*)")
CHAT = (
    '{"messages": [{"role": "user", "content": "%d+1?"}, {"role": "assistant", "content": "%d"}]}\n'
)


def commands() -> dict[str, set[str]]:
    """Each command in a block of code, and the pages that have it."""
    found: dict[str, set[str]] = {}
    for page in PAGES:
        language = None
        lines = iter(page.read_text("utf-8").replace("\\\n", " ").splitlines())
        for line in lines:
            if line.startswith("```"):
                language = None if language is not None else line[3:]
                continue
            is_code = language in ("", "bash") or (language is None and line.startswith("    "))
            if is_code and (match := COMMAND.fullmatch(line)):
                # what stands far to the right, or behind #, is said of it
                text = re.split(r"\s{2,}|\s+#\s", match[1])[0]
                found.setdefault(text, set()).add(page.name)
    return found


ALL = commands()
TRAIN = sorted(text for text in ALL if text.startswith("astrai-train "))
SERVE = sorted(text for text in ALL if re.match("astrai-(serve|batch|chat)( |$)", text))
DATA = [text for text in ALL if text.startswith("astrai-data ")]
MODEL = [text for text in ALL if text.startswith("astrai-model ")]
MAKE = sorted(text for text in ALL if text.startswith("make "))


def words(text: str) -> list[str]:
    """A command's words; of [optional] ones and a|b the first is taken."""
    text = re.sub(r"\[(.*?)\]", r"\1", text)
    return [word.split("|")[0] for word in shlex.split(text)][1:]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder in which the names that the pages use exist."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "configs").symlink_to(ROOT / "configs")
    texts = folder / "my/texts"
    texts.mkdir(parents=True)
    lines = [f"{a} plus {b} is {a + b}. 你好，世界！" for a in range(30) for b in range(9)]
    (texts / "a.txt").write_text("\n".join(lines), "utf-8")
    chats = "".join(CHAT % (number, number + 1) for number in range(60))
    for name in ("my/chats.jsonl", "chats.jsonl"):
        (folder / name).write_text(chats, "utf-8")
    tokenizer = AutoTokenizer.train(lines, 290)
    for name in ("runs/tokenizer", "runs/demo/tokenizer", "runs/10m/tokenizer"):
        tokenizer.save_pretrained(folder / name)
    shape = ModelConfig(
        vocab_size=tokenizer.vocab_size, dim=32, n_layers=1, dim_ffn=64, n_heads=2, max_len=2048
    )
    model = AutoModel.from_config(shape)
    for name in (
        *("runs/seq/checkpoints/last", "runs/sft/checkpoints/last", "DIR", "BASE"),
        *("runs/demo/sft/checkpoints/last", "runs/dpo/checkpoints/last"),
    ):
        AutoModel.save_pretrained(model, folder / name)
        tokenizer.save_pretrained(folder / name)
    body = '{"messages": [{"role": "user", "content": "1+1?"}], "max_tokens": 4}'
    (folder / "batch.jsonl").write_text(
        f'{{"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {body}}}\n'
    )
    return folder


@pytest.fixture
def there(world, monkeypatch) -> Path:
    monkeypatch.chdir(world)
    return world


def test_the_pages_have_commands():
    assert len(ALL) > 40
    assert {"docs", "README"} <= {page.parent.name for page in PAGES} | {"README"}
    known = [*TRAIN, *SERVE, *DATA, *MODEL, *MAKE]
    assert [text for text in ALL if text not in known and not text.startswith("python ")] == []


@pytest.mark.parametrize("text", TRAIN)
def test_options_of_training_are_read(there, text):
    if "..." in text:
        text = text.replace("...", "configs/seq.yaml")
    assert check(words(text))[0] == words(text)[0]


@pytest.mark.parametrize("text", SERVE)
def test_options_of_serving_are_read(text):
    kinds = {
        "astrai-serve": (ServeOptions, EngineConfig),
        "astrai-batch": (BatchOptions, EngineConfig),
        "astrai-chat": (ChatOptions,),
    }[text.split()[0]]
    if len(kinds) == 1:
        parse_one(words(text), text.split()[0], *kinds)
    else:
        parse(words(text), text.split()[0], *kinds)


@pytest.mark.parametrize("text", MAKE)
def test_make_has_the_target(text):
    target = text.split()[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def made_small(text: str) -> list[str]:
    """The command with what keeps it short."""
    given = words(text)
    name = given[0]
    if name == "tokenizer":
        given[given.index("--vocab_size") + 1] = "290"
    elif name == "curriculum":
        given += ["--train", "500", "--held_out", "5"]
    elif name == "reasoning":
        given = [word for word in given if word not in ("--count", "200")] + ["--count", "8"]
    elif name in ("fit", "test", "validate", "lr-find"):
        # a page's run may be another page's with other options
        given += ["--fresh"] if name == "fit" else []
        small = {"trainer.max_steps": 2, "trainer.val_check_interval": "null"}
        small |= {"trainer.check_val_every_n_epoch": 1, "model.init_args.compile": "false"}
        small |= {"data.init_args.batch_size": 2, "trainer.accumulate_grad_batches": 1}
        if "grpo" in text:
            small |= {"model.init_args.rollout.max_completion": 8}
            small |= {"model.init_args.rollout.num_generations": 2}
            small |= {"data.init_args.window_size": 1024}  # a token here is hardly more than a byte
        if "init_from" in text and ("sft" in text or "lora" in text):
            # as the page says: not what was prepared with another tokenizer
            small |= {f"data.init_args.{one}": "my/chats.jsonl" for one in ("train", "val")}
        if name == "lr-find":
            given += ["--steps", "10"]
        given += [f"--{key}={value}" for key, value in small.items()]
    return given


def test_commands_on_data_and_models_do_what_they_say(there, capsys):
    for text in (*DATA, *MODEL):
        if " merge " in text:
            continue  # wants an adapter, which is trained: the slow form
        given = made_small(text)
        out = Path(given[given.index("--out") + 1]) if "--out" in given else None
        if out and out.exists() and given[0] != "prompts":
            shutil.rmtree(out) if out.is_dir() else out.unlink()
        (data_main if text in DATA else model_main)(given)
        assert out is None or out.exists(), text
    assert "trained" in capsys.readouterr().out


def start(program: str, given: list[str], folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [SCRIPTS / program, *given],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def serves_until_stopped(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if "http://127.0.0.1:" in line:
            process.send_signal(signal.SIGINT)
    process.stdout.close()
    process.wait(60)
    return said


def make_data(world: Path) -> None:
    """What pages speak of as made before, or as one's own."""
    tokenizer = ("--tokenizer", str(world / "runs/tokenizer"))
    for stage, source in (("seq", "my/texts"), ("sft", "my/chats.jsonl")):
        for split in ("train", "val"):
            out = world / f"runs/data/{stage}-{split}.h5"
            out.unlink(missing_ok=True)
            given = ["--input", str(world / source), "--out", str(out)]
            data_main(["prepare", "--stage", stage, *tokenizer, *given])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_command_does_what_it_says(world):
    for run in ("seq", "sft", "dpo"):
        shutil.rmtree(world / "runs" / run)  # they are trained here
    skipped = []
    for text in ALL:
        program, *_ = text.split()
        if program in ("make", "python", "astrai-chat") or "..." in text or "1b" in text:
            skipped.append(text)
            continue
        given = made_small(text)
        out = world / given[given.index("--out") + 1] if "--out" in given else None
        if out and out.exists() and given[0] not in ("prompts", "merge"):
            shutil.rmtree(out) if out.is_dir() else out.unlink()
        if program == "astrai-serve":
            given += ["--port", "0"]
        if "compare" in given:
            shutil.copytree(world / "runs/sft", world / "runs/sft2", symlinks=True)
        if "merge" in given or "--adapter" in given:
            given = [word.replace("DIR", "runs/lora/checkpoints/last") for word in given]
        process = start(program, given, world)
        if program == "astrai-serve" or "watch" in given:
            said = serves_until_stopped(process)
            assert "http://127.0.0.1:" in said, f"{text}: {said}"
            continue
        said, _ = process.communicate()
        assert process.returncode == 0, f"{text}: {said[-2000:]}"
        if "tokenizer" in given[0]:
            make_data(world)
    assert len(skipped) < 20
