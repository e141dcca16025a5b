"""`astrai-data` as a user meets it."""

import subprocess
import sys

import pytest

from astrai_train.data.cli import main
from astrai_train.data.storage import H5Storage


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
