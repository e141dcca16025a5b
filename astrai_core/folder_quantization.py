"""A model folder with quantised weights: smaller on disk, in memory and in what a token reads."""

import shutil
from pathlib import Path

from astrai_core.atomic_folder import replace_folder
from astrai_core.model import AutoModel
from astrai_core.model.adapter import is_adapter_folder
from astrai_core.model.auto import config_json, read_config_json, write_model
from astrai_core.model.quantization import Scheme, described_scheme
from astrai_core.model.weights import INDEX, weight_files

# what may lie beside the weights; a trainer's state and pickled weights are left behind
_COMPANIONS = {".json", ".jinja", ".txt", ".model", ".md", ".tiktoken", ""}


def quantize_folder(folder: Path, out: Path, scheme: Scheme) -> str:
    """Write a folder of the same model with quantised weights, its tokenizer beside them.

    Args:
        folder: a model folder of ours or of a known family, whose weights are not quantised.
        out: takes the new folder; one that is there is replaced.
        scheme: how.

    Returns:
        What became of the size, in one line for the user.

    Raises:
        ValueError: the folder is no such one, or `out` is, holds or lies in it.
    """
    content = read_config_json(folder)
    if is_adapter_folder(folder):
        raise ValueError(
            f"{folder} is an adapter; merge it first (astrai-model merge {folder} --out FOLDER) "
            "and quantise that folder"
        )
    if (stored := described_scheme(content)) is not None:
        raise ValueError(
            f"{folder} holds {stored} weights already; quantise the folder it was made from"
        )
    source, target = folder.resolve(), out.resolve()
    if target in (source, *source.parents) or source in target.parents:
        raise ValueError(f"--out {out} would replace or lie in {folder}; choose another place")
    if target.is_dir() and any(target.iterdir()) and not (target / "config.json").is_file():
        raise ValueError(f"--out {out} is a folder of something else, which would be lost")
    before = sum(file.stat().st_size for file in weight_files(folder))
    model = AutoModel.from_pretrained(folder, scheme=scheme)
    with replace_folder(out) as temporary:
        for path in folder.iterdir():
            if path.is_file() and path.suffix in _COMPANIONS and path.name != INDEX:
                shutil.copyfile(path, temporary / path.name)
        write_model(temporary, config_json(model), model.state_dict())
    after = sum(file.stat().st_size for file in weight_files(out))
    return f"{out}: {scheme} weights, {after / 1e6:,.1f} MB instead of {before / 1e6:,.1f}"
