import pytest
import yaml

from astrai_core.command_line import CommandLineError
from astrai_train.cli import check, main


@pytest.fixture
def config(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("trainer: {max_steps: 3}\n")
    return str(file)


def test_options_are_passed_on_as_the_parser_wants_them(config):
    assert check(["fit", "--config", config, "--fresh", "--trainer.max_steps=3"]) == (
        "fit",
        ["--config", config, "--fresh=true", "--trainer.max_steps=3"],
    )
    assert check(["fit", "--fresh", "false"]) == ("fit", ["--fresh", "false"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fit", "--modle.lr", "1"], "did you mean --model?"),
        (["train"], "train is not a command"),
        (["fit", "--config=gone.yaml"], "gone.yaml does not exist"),
    ],
)
def test_mistakes_are_found_without_loading_anything(arguments, words):
    with pytest.raises(CommandLineError, match=words):
        check(arguments)


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in ("fit", "validate", "test", "predict", "plan"))


def printed(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(["fit", *arguments, "--print_config"])
    assert end.value.code == 0
    return capsys.readouterr().out


def test_a_printed_configuration_is_the_same_configuration(capsys, tmp_path):
    options = ("--config", "configs/seq.yaml", "--config", "configs/trainer/cpu.yaml")
    first = printed(capsys, *options, "--trainer.max_steps", "7", "--model.model.dim", "96")
    content = yaml.safe_load(first)
    assert content["trainer"]["max_steps"] == 7
    assert content["trainer"]["accelerator"] == "cpu"
    assert content["model"]["init_args"]["model"]["dim"] == 96
    again = tmp_path / "printed.yaml"
    again.write_text(first, encoding="utf-8")
    assert printed(capsys, "--config", str(again)) == first
