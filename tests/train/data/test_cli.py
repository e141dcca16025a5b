"""`astrai-data` as a user meets it."""

import json
import signal
import subprocess
import sys
import time

import psutil
import pytest

from astrai_train.data import prepare as preparing
from astrai_train.data import records
from astrai_train.data.cli import main
from astrai_train.data.storage import H5Storage, JSONStorage


def fails(capsys, *arguments):
    """The one line a failing command says, and its status."""
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    error = capsys.readouterr().err
    assert error.startswith("astrai-data: ")
    assert error.count("\n") == 1
    return error, exit_.value.code


def test_from_text_to_what_is_taught(folder, capsys):
    chats, tok, out = folder / "chats.jsonl", folder / "own", folder / "own.h5"
    main(
        [
            "tokenizer",
            "--input",
            str(chats),
            str(folder / "texts.jsonl"),
            "--out",
            str(tok),
            "--vocab-size=280",
        ]
    )
    main(
        [
            "prepare",
            "--stage=sft",
            "--tokenizer",
            str(tok),
            "--input",
            str(chats),
            "--out",
            str(out),
            "--workers=1",
        ]
    )
    assert len(H5Storage(out)) == 3
    main(["inspect", str(out), "--tokenizer", str(tok), "--first", "1", "--count", "1"])
    shown = capsys.readouterr().out
    assert "⟦四。<|im_end|>⟧" in shown
    assert "⟦6<|im_end|>⟧" in shown
    assert "⟦Hello" not in shown
    assert "stage      sft" in shown
    main(["inspect", str(chats), "--tokenizer", str(tok), "--window-size", "400"])
    assert "row 0 of 1" in capsys.readouterr().out
    main(["inspect", str(folder / "texts.jsonl"), "--tokenizer", str(tok), "--window-size", "30"])
    assert "bytes per token" in capsys.readouterr().out


def inspected(capsys, folder, stage, lines, window=40):
    """What `inspect` shows of records in rows of a window, colours as marks."""
    file = folder / f"{stage}.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in lines))
    options = ["--tokenizer", str(folder / "tok"), "--stage", stage, "--window-size", str(window)]
    main(["inspect", str(file), *options])
    return capsys.readouterr().out


LONG = "abcdefghijklmnopqrstuvwxyz " * 3


@pytest.mark.parametrize(
    ("stage", "lines", "what", "others"),
    [
        ("sft", [{"prompt": "Hi", "completion": answer} for answer in ("a", LONG)], "samples", 0),
        (
            "dpo",
            [{"prompt": "Hi", "chosen": "a", "rejected": answer} for answer in ("b", LONG)],
            "pairs",
            1,
        ),
        (
            "grpo",
            [
                {"prompt": "Hi", "responses": ["a", answer, "c"], "rewards": [1, 0, 0]}
                for answer in ("b", LONG)
            ],
            "prompts",
            2,
        ),
        ("grpo", [{"prompt": question} for question in ("Hi", LONG)], "prompts", 0),
    ],
)
def test_what_is_too_long_is_shown_with_what_is_lost(
    folder, capsys, tokenizer, stage, lines, what, others
):
    shown = inspected(capsys, folder, stage, lines)
    storage = JSONStorage(folder / f"{stage}.jsonl", stage, tokenizer)
    lost = storage.record_starts[1]
    lengths = storage.input_ids.lengths
    (longest,) = (n for n in range(len(storage)) if lengths[n] > 40)
    beyond = int(lengths[longest]) - 40
    trained = int(storage.trained[longest][40:].sum())
    assert f"sample {longest}, {folder / stage}.jsonl line 2, {40 + beyond} tokens: " in shown
    assert f": {beyond} beyond the window, {trained} of them trained\n" in shown
    assert shown.count("left out with another of its record") == others
    _, _, rest = shown.partition("⟪")
    text, mark, _ = rest.partition("⟫")
    assert mark
    assert text == tokenizer.decode(
        storage.input_ids[longest][40:].tolist(), skip_special_tokens=False
    )
    total = int(lengths[lost:].sum())
    assert f"too long   1 of 2 {what} have more than 40 tokens: refused, or with" in shown
    assert f"{total} tokens lost" in shown
    whole = inspected(capsys, folder, stage, lines, window=400)
    assert f"too long   none of 2 {what}\n" in whole
    assert "⟪" not in whole


def test_documents_that_rows_cut_are_shown(folder, capsys, tokenizer):
    shown = inspected(capsys, folder, "seq", [{"text": "a"}, {"text": LONG}])
    length = len(tokenizer.encode(LONG)) + 1
    here = 40 - len(tokenizer.encode("a")) - 1
    place = f"of {folder / 'seq'}.jsonl line 2"
    assert f"✂ {length - here} tokens {place} follow in later rows" in shown
    assert f"✂ {here} tokens {place} are in earlier rows" in shown
    assert "windows    1 of 2 documents go on in another row; no token is lost" in shown
    whole = inspected(capsys, folder, "seq", [{"text": "a"}, {"text": LONG}], window=400)
    assert "✂" not in whole
    assert "windows    0 of 2 documents" in whole


def test_documents_that_were_too_long_for_one_are_shown(folder, capsys, monkeypatch):
    monkeypatch.setattr(records, "LONGEST_DOCUMENT", 100)
    file, out = folder / "a.txt", folder / "a.h5"
    file.write_text("short\n<|endoftext|>\n" + f"{LONG}\n" * 3)
    tokenizer = ["--tokenizer", str(folder / "tok")]
    options = [*tokenizer, "--workers=1", "--out", str(out), "--input", str(file), str(file)]
    monkeypatch.setattr(preparing, "_PART_RECORDS", 3)
    main(["prepare", "--stage=seq", *options])
    for given, cuts in ((str(file), 2), (str(out), 4)):
        capsys.readouterr()
        main(["inspect", given, *tokenizer, "--count", "4"])
        shown = capsys.readouterr().out
        assert shown.count("✂ its document was too long and goes on in the next sample") == 2
        for number, is_cut in enumerate([False, True, True, False]):
            (heading,) = (one for one in shown.splitlines() if one.startswith(f"sample {number},"))
            assert ("✂" in heading) == is_cut
        assert f"were cut in {cuts} places, at the end of {file} line 3 first" in shown


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_preparing_and_its_processes(folder, texts, number):
    """No process is left, nothing is said of semaphores, and the next run goes on."""
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "many.jsonl").write_text(lines * 40_000)  # some thirty parts
    options = ["--stage=seq", "--tokenizer", folder / "tok", "--out", folder / "many.h5"]
    code = "from astrai_train.data.cli import main; main()"
    command = [sys.executable, "-c", code, "prepare", *options, "--input", folder / "many.jsonl"]
    with subprocess.Popen(
        [*map(str, command), "--workers=2"], stderr=subprocess.PIPE, text=True
    ) as process:
        while not list(folder.glob(".many.h5.parts-*/000001.h5")):
            assert process.poll() is None
            time.sleep(0.02)
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) >= 2
        process.send_signal(number)
        _, error = process.communicate(timeout=120)
    if number == signal.SIGTERM:
        assert process.returncode == 143
        assert error == "astrai-data: stopped by SIGTERM; run it again to go on\n"
    assert not psutil.wait_procs(children, timeout=30)[1]
    assert list(folder.glob(".many.h5.parts-*/000001.h5"))


def test_mistakes_take_one_line(folder, capsys):
    tok, chats, out = folder / "tok", folder / "chats.jsonl", folder / "a.h5"
    options = ["--tokenizer", tok, "--input", chats, "--out", out, "--workers", 1]
    assert fails(capsys, "prepar") == (
        "astrai-data: no command prepar; did you mean prepare? (astrai-data --help lists all)\n",
        2,
    )
    error, status = fails(capsys, "prepare", "--stage", "sft", "--tokeniser", tok)
    assert "unknown option --tokeniser; did you mean --tokenizer?" in error
    assert status == 2
    assert (
        "--stage must be seq or sft or dpo or grpo, not sftt"
        in fails(capsys, "prepare", "--stage", "sftt", *options)[0]
    )
    error, status = fails(capsys, "prepare", "--stage", "seq", *options)
    assert "chats.jsonl line 1: stage seq wants" in error
    assert status == 1
    assert "--input is required" in fails(capsys, "tokenizer", "--out", out)[0]
    error, _ = fails(capsys, "tokenizer", "--input", chats, "--out", tok)
    assert "holds a tokenizer already; --overwrite replaces it" in error
    error, _ = fails(capsys, "tokenizer", "--input", chats, "--out", out, "--vocab-size", 9)
    assert "vocab_size 9 is too small" in error


def test_the_curriculum_is_written(tmp_path, capsys):
    main(["curriculum", "--out", str(tmp_path), "--train", "50", "--held-out", "1"])
    assert "held_out.jsonl" in capsys.readouterr().out


def test_help_comes_without_torch():
    code = (
        "import sys; from astrai_train.data.cli import main\n"
        "try: main(['prepare', '--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'lightning', 'h5py'} & set(sys.modules), 'too much imported'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--workers" in done.stdout
