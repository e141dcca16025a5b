"""Models from and to folders, ours and those of the Hugging Face families that we know."""

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from astrai_core.atomic_folder import replace_folder
from astrai_core.interop import huggingface
from astrai_core.model.adapter import (
    adapter_state,
    attach_adapter,
    base_of,
    is_adapter_folder,
    write_adapter,
)
from astrai_core.model.config import MODEL_TYPE, ModelConfig, read_json
from astrai_core.model.quantization import (
    Scheme,
    described_scheme,
    quantised_tensors,
    quantize_,
    scheme_of,
    with_scheme,
    without_scheme,
)
from astrai_core.model.transformer import Transformer
from astrai_core.model.weights import (
    WEIGHTS,
    assign_weights,
    read_tensors,
    weight_files,
    write_tensors,
)

_log = logging.getLogger(__name__)

_HEAD = "lm_head.weight"
_EMBEDDING = "embed_tokens.weight"


class AutoModel:
    """Builds a `Transformer` from whatever describes one."""

    @staticmethod
    def from_config(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Transformer:
        """Build with random weights."""
        return Transformer(config).to(dtype)

    @staticmethod
    def from_pretrained(
        folder: str | Path,
        dtype: torch.dtype | None = None,
        scheme: Scheme | None = None,
        *,
        maps_bytes: bool = False,
    ) -> Transformer:
        """Load a model folder, in evaluation mode.

        Args:
            folder: holds `config.json` and safetensors; a folder of ours or of a known Hugging Face
                family, which then stays of its family when it is saved. Or a LoRA adapter, whose
                base is loaded too; the model has adapted layers then, which `merge_lora` merges.
            dtype: type of the weights, of those that are not quantised; None keeps the folder's.
            scheme: quantise the weights, one after the other as they are read; None keeps them,
                quantised or not.
            maps_bytes: matrices in int8 stay in their file, as `read_tensors` has it; not for a
                model that is kept as it is.

        Raises:
            ValueError: a file or tensor is missing, truncated or unknown; the message says which.
                Or the folder's weights are quantised by another scheme.
        """
        folder = Path(folder)
        if is_adapter_folder(folder):
            if scheme is not None:
                raise ValueError(
                    f"{folder} is an adapter, whose base cannot be {scheme} under it; merge it "
                    f"first (astrai-model merge {folder} --out FOLDER)"
                )
            base = base_of(folder)
            model = AutoModel.from_pretrained(base, dtype)
            attach_adapter(model, folder, base)
            return model
        origin = read_config_json(folder)
        config, is_ours = parse_config(origin, folder)
        with torch.device("meta"):
            model = Transformer(config)
        stored = described_scheme(origin)
        if scheme is not None and stored is not None and scheme != stored:
            raise ValueError(
                f"{folder} holds {stored} weights, which cannot become {scheme}; quantise the "
                "folder it was made from"
            )
        used = scheme or stored
        if used is not None:
            quantize_(model, used)
        further = range(0) if is_ours else huggingface.further_layers(origin, config.n_layers)
        state = _read_state(folder, config, further, maps_bytes)
        if scheme is not None and stored is None:
            state = quantised_tensors(model, state)
        assign_weights(model, state, folder, dtype)
        model.origin = None if is_ours else huggingface.saved_config(without_scheme(origin))
        return model.eval()

    @staticmethod
    def random(folder: str | Path, dtype: torch.dtype | None = None) -> Transformer:
        """Build what a folder's `config.json` describes, with random weights, for measurements."""
        config, _ = parse_config(read_config_json(Path(folder)), Path(folder))
        return AutoModel.from_config(config, dtype or torch.float32).eval()

    @staticmethod
    def save_pretrained(model: Transformer, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors`, at once or not at all.

        Of a model with adapters, these alone are written, as an adapter folder.
        """
        with replace_folder(Path(folder)) as temporary:
            if model.adapter is not None:
                write_adapter(temporary, model.adapter, adapter_state(model))
                return
            write_model(temporary, config_json(model), model.state_dict())


def config_json(model: Transformer) -> dict[str, object]:
    """The `config.json` that says what the model is."""
    return with_scheme(model.origin or model.config.to_dict(), scheme_of(model))


def read_config_json(folder: Path) -> dict[str, object]:
    """Read a model folder's `config.json`; that of an adapter is its base's.

    Raises:
        ValueError: the folder or the file does not exist; the message says what to pass instead.
    """
    if not folder.is_dir():
        kind = "is a file" if folder.is_file() else "does not exist"
        raise ValueError(
            f"{folder} {kind}; pass a model folder on this disk, names on the Hugging Face hub are "
            "not downloaded"
        )
    if is_adapter_folder(folder):
        folder = base_of(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: it is not a model folder")
    return read_json(folder / "config.json")


def parse_config(content: dict[str, object], folder: Path) -> tuple[ModelConfig, bool]:
    """Return the architecture that a `config.json` describes, and whether the format is ours."""
    try:
        content = without_scheme(content)
        if content.get("model_type", MODEL_TYPE) == MODEL_TYPE:
            return ModelConfig.from_dict(content), True
        return ModelConfig.from_dict(huggingface.to_fields(content)), False
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error


def write_model(folder: Path, config: Mapping[str, object], state: Mapping[str, Tensor]) -> None:
    """Write `config.json` and the weights, given under our names, into an existing folder."""
    named = {huggingface.to_disk_name(name): tensor for name, tensor in state.items()}
    write_tensors(folder / WEIGHTS, named)
    # transformers reads the weights in the type that a foreign config.json names
    kinds = (t.dtype for name, t in state.items() if not name.endswith("_scale"))
    dtype = str(next(t for t in kinds if t.is_floating_point)).removeprefix("torch.")
    config = {**config} | {key: dtype for key in ("dtype", "torch_dtype") if key in config}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _read_state(
    folder: Path, config: ModelConfig, further: range, maps_bytes: bool
) -> Iterator[tuple[str, Tensor]]:
    """Yield our names and tensors, without those of the layers `further`.

    A tied head that the files hold must equal the embedding.
    """
    tied: dict[str, Tensor] = {}
    skipped: set[int] = set()
    for file in weight_files(folder):
        for disk_name, tensor in read_tensors(file, maps_bytes=maps_bytes):
            name = huggingface.from_disk_name(disk_name)
            if name is None:
                continue
            layer = huggingface.layer_of(name)
            if layer is not None and layer in further:
                skipped.add(layer)
                continue
            if config.tie_weight and name in (_HEAD, _EMBEDDING):
                tied[name] = tensor
            if not (config.tie_weight and name == _HEAD):
                yield name, tensor
    if skipped:
        _log.warning(
            "%s: %d of its layers only predict tokens further ahead; they are not loaded",
            folder,
            len(skipped),
        )
    if _HEAD in tied and _EMBEDDING in tied and not torch.equal(tied[_HEAD], tied[_EMBEDDING]):
        raise ValueError(
            f"{folder}: config.json ties lm_head to the embedding, but the files hold two "
            "different matrices; set tie_weight (tie_word_embeddings) to false"
        )
