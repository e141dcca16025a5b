"""The folder that `--ckpt_path` names: whether a command can do anything with it.

Each check is done before a model is made, and says what to name instead.
"""

import dataclasses
from pathlib import Path

from astrai_core.atomic_folder import read_last
from astrai_core.checkpoint import load_entry
from astrai_core.model import ModelConfig
from astrai_core.model.adapter import is_adapter_folder
from astrai_core.model.auto import parse_config, read_config_json
from astrai_train.callbacks.checkpoint import FOLDER, OBJECTIVE, STATE, has_state


def refuse_no_checkpoint(folder: Path) -> None:
    """Check that the folder holds a model or an adapter.

    Raises:
        ValueError: it does not.
    """
    if (folder / "config.json").is_file() or is_adapter_folder(folder):
        return
    hint = "name a checkpoint folder, as runs/seq/checkpoints/last"
    for root in (folder / FOLDER, folder):
        if (last := read_last(root)) is not None:
            hint = f"its newest checkpoint is {last}"
    if not folder.exists():
        kind = "does not exist"
    elif folder.is_file():
        kind = "is a file"
    else:
        kind = "has no config.json: it is not a checkpoint folder"
    raise ValueError(f"--ckpt_path {folder} {kind}; {hint}")


def refuse_other_objective(folder: Path, class_path: str) -> None:
    """Check that a run of this module can go on from the checkpoint.

    Raises:
        ValueError: it holds weights alone, or the state of another objective's run.
    """
    begin = f"to begin with its weights, use --model.init_args.init_from {folder}"
    if not has_state(folder):
        raise ValueError(
            f"--ckpt_path {folder} is a model folder without the state of a run; {begin}"
        )
    found = load_entry(folder / STATE, OBJECTIVE)
    wanted = class_path.rpartition(".")[2]
    # a checkpoint of an earlier version does not say
    if found not in (None, wanted):
        raise ValueError(
            f"--ckpt_path {folder} is of a run of {found}, with which {wanted} cannot go on; "
            f"{begin}"
        )


def refuse_other_architecture(folder: Path, wanted: ModelConfig) -> None:
    """Check that the checkpoint's weights fit the model that the configuration describes.

    Raises:
        ValueError: they do not; the message names the fields.
    """
    found, _ = parse_config(read_config_json(folder), folder)
    names = [field.name for field in dataclasses.fields(ModelConfig)]
    pairs = [(name, getattr(found, name), getattr(wanted, name)) for name in names]
    differing = [f"{name} {there!r}, not {here!r}" for name, there, here in pairs if there != here]
    if differing:
        raise ValueError(
            f"--ckpt_path {folder} holds a model of another architecture than the configuration "
            f"describes: {'; '.join(differing)}. Pass the configuration that it was trained with "
            "(config.yaml of its run)"
        )
