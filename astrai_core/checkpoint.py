"""A checkpoint is a model folder, servable as it is, with the trainer's state beside the weights.

    config.json  model.safetensors  [tokenizer.json ...]  [trainer/{state.safetensors,state.json}]

One of a LoRA run is an adapter folder with the same beside: `adapter_config.json` names its base.

A folder is written under a temporary name, synced and renamed, so that a folder with its final
name is always whole; `last` is a link that moves afterwards. Nothing is pickled.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from astrai_core.atomic_folder import replace_folder
from astrai_core.model.adapter import (
    adapter_state,
    is_adapter_folder,
    read_adapter,
    write_adapter,
)
from astrai_core.model.auto import (
    AutoModel,
    config_json,
    parse_config,
    read_config_json,
    write_model,
)
from astrai_core.model.config import ModelConfig, read_json
from astrai_core.model.lora import Adapter
from astrai_core.model.transformer import Transformer
from astrai_core.model.weights import read_tensors, write_tensors
from astrai_core.tokenizer import AutoTokenizer

_TRAINER = "trainer"
_PLAIN = (bool, int, float, str, type(None))


@dataclass(kw_only=True)
class Checkpoint:
    """The content of one checkpoint folder."""

    model_state: dict[str, Tensor]
    """Weights, under the names of `Transformer.state_dict()`."""
    config: dict[str, object]
    """Content of `config.json`."""
    tokenizer: AutoTokenizer | None = None
    """Saved beside the weights, so that the folder can be served."""
    trainer_state: dict[str, object] | None = None
    """Nested dicts, lists and tuples of tensors, numbers, strings, booleans and None."""
    adapter: Adapter | None = None
    """What the weights are where they are LoRA's matrices alone; `config` is the base's then."""

    @classmethod
    def of_model(
        cls,
        model: Transformer,
        tokenizer: AutoTokenizer | None = None,
        trainer_state: dict[str, object] | None = None,
    ) -> "Checkpoint":
        """Collect a model's own tensors (not copied) and its configuration."""
        return cls(
            model_state=adapter_state(model) if model.adapter else model.state_dict(),
            config=config_json(model),
            tokenizer=tokenizer,
            trainer_state=trainer_state,
            adapter=model.adapter,
        )

    @property
    def model_config(self) -> ModelConfig:
        """The architecture that `config` describes."""
        return parse_config(self.config, Path("checkpoint"))[0]

    def save(self, folder: str | Path) -> None:
        """Write the folder at once or not at all; an older one of that name is replaced.

        Raises:
            OSError: the disk is full or not writable; nothing of the attempt remains.
        """
        with replace_folder(Path(folder)) as temporary:
            if self.adapter is not None:
                write_adapter(temporary, self.adapter, self.model_state)
            else:
                write_model(temporary, self.config, self.model_state)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(temporary)
            if self.trainer_state is not None:
                (temporary / _TRAINER).mkdir()
                save_state(temporary / _TRAINER, self.trainer_state)

    @classmethod
    def load(cls, folder: str | Path) -> "Checkpoint":
        """Read a checkpoint or plain model folder; of an adapter, without its base's weights.

        Raises:
            ValueError: something is missing, truncated or unknown; the message says what.
        """
        folder = Path(folder)
        if is_adapter_folder(folder):
            adapter, model_state = read_adapter(folder)
        else:
            adapter, model_state = None, AutoModel.from_pretrained(folder).state_dict()
        trainer = folder / _TRAINER
        return cls(
            model_state=model_state,
            config=read_config_json(folder),
            tokenizer=(
                AutoTokenizer.from_pretrained(folder)
                if (folder / "tokenizer.json").is_file()
                else None
            ),
            trainer_state=load_state(trainer) if trainer.is_dir() else None,
            adapter=adapter,
        )


def save_state(folder: Path, state: dict[str, object]) -> None:
    """Write nested state as `state.safetensors` and `state.json`.

    Raises:
        TypeError: a value is of a kind that cannot be restored; the message says where it stands.
    """
    tensors: dict[str, Tensor] = {}
    tree = _encode(state, "state", tensors)
    write_tensors(folder / "state.safetensors", tensors)
    (folder / "state.json").write_text(json.dumps(tree), encoding="utf-8")


def load_state(folder: Path) -> dict[str, object]:
    """Read what `save_state` wrote; tensors are copies that own their memory.

    Raises:
        ValueError: a file is missing or damaged, or the two do not belong together.
    """
    for name in ("state.safetensors", "state.json"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} lacks {name}: the trainer's state is not whole")
    tensors = {name: t.clone() for name, t in read_tensors(folder / "state.safetensors")}
    try:
        state = _decode(read_json(folder / "state.json"), tensors)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'state.json'} is damaged ({error!r})") from error
    assert isinstance(state, dict)
    return state


def load_entry(folder: Path, key: str) -> object:
    """Read one entry of a saved state, which holds no tensor; None if it is not there.

    Raises:
        ValueError: the file is missing or damaged.
    """
    file = folder / "state.json"
    try:
        content: Any = read_json(file)
        entries = dict(content["dict"])
        return _decode(entries[key], {}) if key in entries else None
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is damaged ({error!r})") from error


def _encode(value: object, path: str, tensors: dict[str, Tensor]) -> object:
    if isinstance(value, Tensor):
        name = f"{len(tensors)} {path}"  # numbered, for 1 and "1" may stand in one dict
        # a clone: safetensors refuses tensors that share memory
        tensors[name] = value.detach().clone(memory_format=torch.contiguous_format)
        return {"tensor": name}
    if isinstance(value, dict):
        for key in value:
            if type(key) not in _PLAIN:
                raise TypeError(f"{path} has the key {key!r}, which a checkpoint cannot hold")
        # pairs, because keys may be integers, which JSON would turn into strings
        return {"dict": [[k, _encode(v, f"{path}/{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_encode(v, f"{path}/{n}", tensors) for n, v in enumerate(value)]}
    if type(value) in _PLAIN:
        return {"value": value}
    raise TypeError(f"{path} is a {type(value).__name__}, which a checkpoint cannot hold")


def _decode(node: dict[str, Any], tensors: dict[str, Tensor]) -> object:
    ((kind, content),) = node.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _decode(child, tensors) for key, child in content}
    if kind == "value":
        return content
    children = [_decode(child, tensors) for child in content]
    return children if kind == "list" else tuple(children)
