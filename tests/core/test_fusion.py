"""A fused model is the model: its logits, whatever its layers, and its rows' bits."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from astrai_core.model import AttentionContext, ModelConfig, Transformer, fusion
from astrai_core.model.fusion import FusedGQA, FusedMLP, fuse_
from astrai_core.model.lora import LoRAConfig, add_lora
from astrai_core.model.packed import why_not_packed
from astrai_core.model.quantization import SCHEMES, quantize_
from astrai_core.model.rotary import rotate
from astrai_core.model.rowwise import RowwiseMLA, RowwiseMoE

pytestmark = pytest.mark.skipif(
    fusion.why_not_fused() is not None, reason="no compiled operators here"
)
SHAPE: dict[str, Any] = {
    "vocab_size": 61, "dim": 48, "n_layers": 2, "dim_ffn": 80, "n_heads": 6, "n_kv_heads": 2,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "qk-norm": {},
    "biases, interleaved": {
        "use_qk_norm": False, "attention_bias": True, "ffn_bias": True, "rope_interleaved": True,
    },
    "gate, window": {"use_gated_attention": True, "sliding_window": 3},
    "mla": {
        "attn_type": "mla", "n_kv_heads": None, "use_qk_norm": False, "kv_lora_rank": 16,
        "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 16,
    },
}  # fmt: skip


def model_of(**changes):
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**{**SHAPE, **changes})).eval()
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.1
    return model


@pytest.mark.parametrize("scheme", [None, *SCHEMES])
@pytest.mark.parametrize("changes", MODELS.values(), ids=list(MODELS))
def test_the_logits_are_the_models(changes, scheme):
    model, ids = model_of(**changes), torch.arange(22).view(2, 11)
    if scheme:
        quantize_(model, scheme)
    with torch.inference_mode():
        wanted = model(ids)["logits"]
        got = fuse_(model)(ids)["logits"]
    assert isinstance(model.layers[0].mlp, FusedMLP)
    assert isinstance(model.layers[0].self_attn, FusedGQA) == (changes.get("attn_type") != "mla")
    # a rounding of the norm's may move an activation to the next of 127 steps
    tolerance = 0.05 if scheme == "w8a8" else 1e-4
    torch.testing.assert_close(got, wanted, atol=tolerance, rtol=tolerance)


class Recorded(TorchDispatchMode):
    """Notes the operators that are called."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


class Given(AttentionContext):
    """Attention that needs no operator: its output is known before."""

    def __init__(self, out):
        self.out = out

    def attend(self, layer, q, k, v, *, scale, window=None):
        return self.out


LATENT = MODELS["mla"]
EXPERTS: dict[str, Any] = {
    "ffn_type": "moe", "n_routed_experts": 8, "n_activated_experts": 3, "dim_ffn_expert": 24,
    "n_shared_experts": 1,
}  # fmt: skip
HEADS = ("astrai_packed::qkv", "astrai_packed::add_linear")
LATENTS = ("astrai_packed_latent::queries", "astrai_packed_latent::add_output")


@pytest.mark.skipif(why_not_packed() is not None, reason=str(why_not_packed()))
@pytest.mark.parametrize(
    ("changes", "operators"),
    [
        ({}, (*HEADS, "astrai_packed::mlp")),
        (EXPERTS, (*HEADS, "astrai_packed_experts::moe")),
        (LATENT, (*LATENTS, "astrai_packed::mlp")),
        ({**LATENT, **EXPERTS, "q_lora_rank": 24}, (*LATENTS, "astrai_packed_experts::moe")),
    ],
    ids=["gqa", "gqa, experts", "mla", "mla, experts"],
)
def test_a_packed_block_is_three_operators_and_attention(changes, operators):
    model = model_of(**changes)
    quantize_(model, "w8a8")
    fuse_(model)
    x, turn = torch.randn(5, 48), torch.ones(5, model.rotary_embedding.dim // 2)
    context = Given(torch.randn(5, 6, model.config.kv_lora_rank or model.config.query_dim))
    with torch.inference_mode(), Recorded() as recorded:
        model.layers[1](x, (turn, turn), context)
    assert tuple(recorded.names) == operators


@pytest.mark.parametrize("missing", ["packed", "packed_latent and packed_experts"])
def test_without_packed_operators_latents_and_experts_go_row_by_row(monkeypatch, missing):
    for name in missing.split(" and "):
        monkeypatch.setattr(fusion, f"why_not_{name}", lambda: "no AVX512-VNNI")
    model, ids = model_of(**LATENT, **EXPERTS), torch.arange(22).view(2, 11)
    quantize_(model, "w8a8")
    with torch.inference_mode():
        wanted = model(ids)["logits"]
        got = fuse_(model)(ids)["logits"]
    assert isinstance(model.layers[0].self_attn, RowwiseMLA)
    assert isinstance(model.layers[0].mlp, RowwiseMoE)
    torch.testing.assert_close(got, wanted, atol=0.05, rtol=0.05)


def test_layers_with_adapters_stay_as_they_are():
    model = model_of()
    add_lora(model, LoRAConfig(rank=2, targets=["q_proj", "up_proj"]))
    fuse_(model)
    kinds = {type(module) for module in model.modules()}
    assert not kinds & {FusedGQA, FusedMLP}


def test_without_a_compiler_nothing_changes(monkeypatch):
    monkeypatch.setattr(fusion, "why_not_fused", lambda: "no compiler")
    before = str(model_of())
    assert str(fuse_(model_of())) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [5, 64, 83])
def test_norm_and_gate_against_torch(width, dtype):
    x, weight = torch.randn(9, 2 * width).to(dtype), torch.randn(2 * width).to(dtype)
    close: dict[str, Any] = (
        {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.01, "atol": 0.01}
    )
    normed = F.rms_norm(x.float(), (2 * width,), weight.float(), 1e-5).to(dtype)
    got = torch.ops.astrai_fusion.rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(got, normed, **close)
    x = x * 30  # where the exponential is none, or too large
    gated = F.silu(x[:, :width].float()) * x[:, width:].float()
    torch.testing.assert_close(torch.ops.astrai_fusion.gated(x), gated.to(dtype), **close)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("has_norm", [False, True])
def test_heads_against_torch(has_norm, interleaved):
    x, cos, sin = torch.randn(5, 6 * 10), torch.randn(5, 5), torch.randn(5, 5)
    q_weight, k_weight = (torch.randn(10), torch.randn(10)) if has_norm else (None, None)
    got = torch.ops.astrai_fusion.heads(x, q_weight, k_weight, cos, sin, 4, 1, 1e-5, interleaved)
    parts = list(x.view(5, 6, 10).split((4, 1, 1), dim=1))
    for n, weight in enumerate((q_weight, k_weight)):
        if weight is not None:
            parts[n] = F.rms_norm(parts[n], (10,), weight, 1e-5)
        parts[n] = rotate(parts[n], cos, sin, interleaved=interleaved)
    for one, wanted in zip(got, parts, strict=True):
        torch.testing.assert_close(one, wanted)


def test_a_row_does_not_depend_on_the_others():
    x, weight = torch.randn(300, 96), torch.randn(96)
    for operator in (
        torch.ops.astrai_fusion.gated,
        lambda rows: torch.ops.astrai_fusion.rms_norm(rows, weight, 1e-5),
    ):
        assert torch.equal(operator(x)[7:8], operator(x[7:8]))


def test_what_is_no_number_stays_so():
    x = torch.ones(2, 16)
    x[0, 3] = torch.nan
    assert torch.ops.astrai_fusion.gated(x).isnan().any(1).tolist() == [True, False]
    normed = torch.ops.astrai_fusion.rms_norm(x, torch.ones(16), 1e-5)
    assert normed.isnan().all(1).tolist() == [True, False]
