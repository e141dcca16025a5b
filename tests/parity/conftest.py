"""Small random models of transformers' own classes, one or more for each family that we read."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from astrai_core.model import AutoModel, Transformer
from astrai_core.tokenizer import AutoTokenizer

VOCABULARY = 300
TEXTS = ["你好，世界！今天天气很好，我们去公园吧。", "hello world, the weather is fine today"]

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
_GROUPED: dict[str, Any] = {"num_key_value_heads": 2}
_EXPERTS: dict[str, Any] = {"moe_intermediate_size": 20, "num_experts_per_tok": 2}
_LATENT: dict[str, Any] = {
    "kv_lora_rank": 16, "q_lora_rank": None, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
    "v_head_dim": 12, "num_key_value_heads": 4, "n_routed_experts": 6, **_EXPERTS,
}  # fmt: skip
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
_LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip


def _rope(rule: dict[str, Any], **more: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 1e4, **rule, **more}}


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama tied": ("Llama", {**_GROUPED, "tie_word_embeddings": True}),
    "llama head_dim, linear": (
        "Llama",
        {"head_dim": 20, "rms_norm_eps": 1e-5, **_rope({"rope_type": "linear", "factor": 2.5})},
    ),
    "llama biases, llama3": (
        "Llama",
        {**_GROUPED, "attention_bias": True, "mlp_bias": True, **_rope(_LLAMA3)},
    ),
    "mistral": ("Mistral", {**_GROUPED, "sliding_window": None}),
    "mistral window": ("Mistral", {**_GROUPED, "sliding_window": 5}),
    "qwen2 tied": ("Qwen2", {**_GROUPED, "tie_word_embeddings": True}),
    "qwen2 upper windows, yarn": (
        "Qwen2",
        {
            **_GROUPED,
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 1,
            **_rope(_YARN),
        },
    ),
    "qwen3 tied": ("Qwen3", {**_GROUPED, "head_dim": 16, "tie_word_embeddings": True}),
    "qwen3 biases, windows by block, yarn": (
        "Qwen3",
        {
            **_GROUPED,
            "head_dim": 8,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            **_rope(_YARN, attention_factor=1.2, beta_fast=4),
        },
    ),
    "qwen3_moe": ("Qwen3Moe", {**_GROUPED, **_EXPERTS, "head_dim": 8, "num_experts": 6}),
    "qwen3_moe first dense, window": (
        "Qwen3Moe",
        {
            **_GROUPED,
            **_EXPERTS,
            "head_dim": 8,
            "num_experts": 6,
            "norm_topk_prob": True,
            "mlp_only_layers": [0],
            "use_sliding_window": True,
            "sliding_window": 5,
        },
    ),
    "deepseek_v2": ("DeepseekV2", {**_LATENT, "first_k_dense_replace": 1}),
    "deepseek_v2 query latent, groups, biases, yarn": (
        "DeepseekV2",
        {
            **_LATENT,
            "q_lora_rank": 12,
            "topk_method": "group_limited_greedy",
            "n_group": 3,
            "topk_group": 2,
            "routed_scaling_factor": 1.5,
            "attention_bias": True,
            **_rope(_YARN, mscale=0.707, mscale_all_dim=0.707),
        },
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {**_LATENT, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    ),
    "deepseek_v3 bias, tied": (
        "DeepseekV3",
        {
            **_LATENT,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 2,
            "norm_topk_prob": False,
            "tie_word_embeddings": True,
        },
    ),
    "deepseek_v3 query latent, groups, yarn": (
        "DeepseekV3",
        {
            **_LATENT,
            "q_lora_rank": 12,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 0,
            **_rope(_YARN, mscale=1.0, mscale_all_dim=0.8),
        },
    ),
    "deepseek_v3 query latent, groups, bias, halves": (
        "DeepseekV3",
        {
            **_LATENT,
            "q_lora_rank": 12,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "n_shared_experts": 2,
            "rope_interleave": False,
            "attention_bias": True,
        },
    ),
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """One random model, as transformers has it and as we read its folder."""

    name: str
    folder: Path
    """What transformers saved, and a tokenizer of ours."""
    theirs: Any
    ours: Transformer


def _make(name: str, folder: Path, **changes: object) -> Any:
    import transformers

    family, shape = FAMILIES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**_SHAPE, **shape, **changes})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            # away from one and zero, so that their place shows
            if "norm" in parameter_name:
                parameter.copy_(torch.rand_like(parameter) + 0.5)
            elif "bias" in parameter_name:
                parameter.copy_(torch.rand_like(parameter) - 0.5)
            else:
                # the blocks outweigh the embedding, or the model would say the same for ever
                is_outer = "embed" in parameter_name or "lm_head" in parameter_name
                parameter.mul_(4 if is_outer else 8)
        for buffer_name, buffer in model.named_buffers():
            if "e_score_correction_bias" in buffer_name and "bias" in name:
                buffer.copy_(torch.rand_like(buffer))
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="session")
def make_family() -> Callable[..., Any]:
    """A function from a name of FAMILIES, a folder and changed keys to a model saved there."""
    return _make


@pytest.fixture(scope="session")
def tokenizer() -> AutoTokenizer:
    """As many tokens as the models have rows."""
    return AutoTokenizer.train(TEXTS * 9, VOCABULARY)


@pytest.fixture(scope="session", params=FAMILIES)
def family(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer: AutoTokenizer,
) -> Family:
    """Each family in turn, built once for all tests."""
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    folder = tmp_path_factory.mktemp("family")
    theirs = _make(request.param, folder)
    tokenizer.save_pretrained(folder)
    ours = AutoModel.from_pretrained(folder)
    return Family(name=request.param, folder=folder, theirs=theirs, ours=ours)
