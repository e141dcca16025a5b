"""PEFT's adapter folders: what their `adapter_config.json` means, and the tensors' names.

    adapter_config.json  adapter_model.safetensors

Plain dicts and names only; nothing here knows the model. A setting that would change the result
and that we do not follow is refused by name, never skipped.
"""

from collections.abc import Sequence

from astrai_core.interop import huggingface

Json = dict[str, object]

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
BASE = "base_model_name_or_path"

_PREFIX = "base_model.model."
_MATRICES = ("lora_A", "lora_B")

_NAMES = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "use_rslora": "rslora"}
OPTIONS = tuple(_NAMES.values())
"""What describes an adapter beside its layers."""

_DEFAULTS: Json = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False}

# keys that say nothing about the numbers: which layers are adapted is told by the tensors
_SILENT = {
    "auto_mapping", BASE, "eva_config", "exclude_modules", "inference_mode", "layers_pattern",
    "layers_to_transform", "megatron_core", "peft_version", "qalora_group_size", "revision",
    "target_modules", "task_type",
}  # fmt: skip

# keys that are only understood at one value; some ways to begin an adapter change the base too
_FIXED: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}


def to_options(config: Json) -> Json:
    """Translate `adapter_config.json` into `rank`, `alpha`, `dropout` and `rslora`.

    Raises:
        ValueError: another kind of adapter, or a setting that we would have to ignore.
    """
    for key, known in _FIXED.items():
        if (value := config.get(key, known[0])) not in known:
            raise ValueError(f"{key} {value!r} is not supported")
    for key, value in config.items():
        if value and key not in _SILENT | _NAMES.keys() | _FIXED.keys():
            raise ValueError(f"{key} {value!r} is not supported")
    if "peft_type" not in config:
        raise ValueError("it names no peft_type")
    return {ours: config.get(theirs, _DEFAULTS[theirs]) for theirs, ours in _NAMES.items()}


def to_config(options: Json, targets: Sequence[str], base: str) -> Json:
    """Write `rank`, `alpha`, `dropout` and `rslora` as `adapter_config.json`.

    Args:
        options: as `to_options` returns them.
        targets: names of the adapted layers, as `to_target` has them.
        base: the folder of the base.
    """
    theirs = {key: options[ours] for key, ours in _NAMES.items()}
    alpha = theirs["lora_alpha"]
    if isinstance(alpha, float) and alpha.is_integer():
        theirs["lora_alpha"] = int(alpha)  # PEFT's own are whole numbers
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        BASE: base,
        **theirs,
        "target_modules": list(targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def to_target(layer: str) -> str:
    """The name of a layer of ours in `target_modules`."""
    return huggingface.to_disk_name(f"{layer}.weight").removesuffix(".weight")


def to_disk_name(name: str) -> str:
    """The name in a file of our `LAYER.lora_A` or `LAYER.lora_B`."""
    return f"{_PREFIX}{huggingface.to_disk_name(name)}.weight"


def from_disk_name(name: str) -> str:
    """Our name of a tensor in a file.

    Raises:
        ValueError: it is no matrix of an adapter, but a whole layer trained beside, say.
    """
    layer, _, matrix = name.removesuffix(".weight").rpartition(".")
    ours = huggingface.from_disk_name(layer.removeprefix(_PREFIX))
    if not name.startswith(_PREFIX) or matrix not in _MATRICES or ours is None:
        raise ValueError(f"the tensor {name} is not supported; adapters of linear layers are")
    return f"{ours}.{matrix}"
