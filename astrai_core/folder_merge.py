"""An adapter and its base become one model folder, which needs neither of them any more."""

import shutil
from pathlib import Path

from astrai_core.atomic_folder import replace_folder
from astrai_core.interop import peft
from astrai_core.model import AutoModel
from astrai_core.model.adapter import attach_adapter, base_of
from astrai_core.model.auto import write_model
from astrai_core.model.lora import merge_lora
from astrai_core.tokenizer import AutoTokenizer


def merge_folder(adapter: Path, base: Path | None, out: Path) -> str:
    """Write the merged model, of its base's family and number format, with its tokenizer.

    Args:
        adapter: folder of the adapter, ours or PEFT's; its tokenizer is taken where it has one.
        base: folder of the base; None is the one that the adapter names.
        out: the folder to write.

    Returns:
        What was written, for the user.

    Raises:
        ValueError: a file is missing or wrong, the adapter belongs to another model, or `out` is
            one of the two folders.
    """
    if not (adapter / peft.CONFIG).is_file():
        raise ValueError(f"{adapter} has no {peft.CONFIG}: it is not an adapter folder")
    base = base or base_of(adapter)
    if out.resolve() in (base.resolve(), adapter.resolve()):
        raise ValueError(f"--out {out} would replace what is read; choose another folder")
    model = AutoModel.from_pretrained(base)
    attach_adapter(model, adapter, base)
    merge_lora(model)
    text = adapter if (adapter / "tokenizer.json").is_file() else base
    with replace_folder(out) as temporary:
        write_model(temporary, model.origin or model.config.to_dict(), model.state_dict())
        if (text / "tokenizer.json").is_file():
            AutoTokenizer.from_pretrained(text).save_pretrained(temporary)
        if (text / "generation_config.json").is_file():
            shutil.copy(text / "generation_config.json", temporary)
    count = sum(parameter.numel() for parameter in model.parameters())
    return f"{out}: {count:,} parameters, {adapter} merged into {base}"
