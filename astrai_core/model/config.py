"""The architecture of a model, in the words of its `config.json`.

Everything is checked once, here; the modules trust it.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeGuard, cast

from astrai_core.model.rope_scaling import RopeScaling
from astrai_core.nearest_name import did_you_mean

MODEL_TYPE = "astrai"
_MOE_FIELDS = (
    "n_routed_experts", "n_shared_experts", "n_activated_experts", "dim_ffn_expert",
    "moe_topk_method", "moe_scoring", "norm_topk_prob", "routed_scaling_factor", "n_expert_groups",
    "n_activated_groups", "first_k_dense",
)  # fmt: skip
# Hugging Face writes these into every config.json; they say nothing about the architecture
_FOREIGN_KEYS = {"model_type", "architectures", "torch_dtype", "dtype", "transformers_version"}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of a `Transformer`.

    Raises:
        ValueError: a field is out of range or contradicts another one; the message names both.
    """

    vocab_size: int = 8192
    """Rows of the embedding."""
    dim: int = 256
    """Width of the residual stream."""
    n_layers: int = 6
    """Number of decoder blocks."""
    dim_ffn: int = 768
    """Inner width of the dense feed-forward network."""
    norm_eps: float = 1e-6
    """Added to the mean square in every RMSNorm."""
    tie_weight: bool = True
    """The output layer is the embedding's own matrix."""
    max_len: int = 2048
    """Longest context in tokens, prompt and answer together."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """Stretches the rotary frequencies over a longer context; null leaves them."""
    rope_interleaved: bool = False
    """Channel 2i turns with 2i + 1, as in DeepSeek's files; else i with i + D/2."""

    n_heads: int = 8
    """Query heads."""
    n_kv_heads: int | None = None
    """Key and value heads, a divisor of `n_heads`; None is as many as `n_heads`."""
    head_dim: int | None = None
    """Width of a head; None is dim / n_heads. It need not be."""
    use_qk_norm: bool = True
    """RMSNorm over each query and key head, before the rotation."""
    use_gated_attention: bool = False
    """A sigmoid gate of the block's input on the attention's output (arXiv 2505.06708)."""
    attention_gate: Literal["elementwise", "headwise"] = "headwise"
    """One gate for each head, or one for each channel of each head."""
    attention_bias: bool = False
    """Bias on the q, k and v projections, as Qwen2 has it; in MLA on those to the latents."""
    attention_output_bias: bool = False
    """Bias on the attention's output projection."""
    sliding_window: int | None = None
    """A token sees at most so many tokens, itself included; None sees all."""
    sliding_window_layers: tuple[int, ...] | None = None
    """Numbers of the blocks that sliding_window is for, from 0; None is every block."""

    attn_type: Literal["gqa", "mla"] = "gqa"
    """Grouped-query attention, or DeepSeek's multi-head latent attention."""
    kv_lora_rank: int = 0
    """MLA: width of the cached latent."""
    q_lora_rank: int | None = None
    """MLA: width of the query latent; None projects queries directly."""
    qk_nope_head_dim: int = 0
    """MLA: width of the part of a head that is not rotated."""
    qk_rope_head_dim: int = 0
    """MLA: width of the rotated part; its key is shared by all heads."""
    v_head_dim: int = 0
    """MLA: width of a value head."""
    latent_norm_eps: float = 1e-6
    """MLA: added to the mean square in the norms of the latents."""

    ffn_type: Literal["mlp", "moe"] = "mlp"
    """SwiGLU, or a DeepSeekMoE mixture of them."""
    ffn_bias: bool = False
    """Bias on the projections of the dense network."""
    first_k_dense: int = 0
    """MoE: so many blocks at the start have the dense network of dim_ffn instead."""
    n_routed_experts: int = 0
    """MoE: experts chosen among by the router."""
    n_shared_experts: int = 0
    """MoE: experts that every token visits."""
    n_activated_experts: int = 0
    """MoE: routed experts for each token."""
    dim_ffn_expert: int = 0
    """MoE: inner width of one expert."""
    moe_topk_method: Literal["greedy", "group_limited_greedy", "noaux_tc"] = "greedy"
    """MoE: plain top-k, top-k within the best groups, or DeepSeek-V3's: within the best groups by
    scores plus a bias that balances the load and touches no weight."""
    moe_scoring: Literal["softmax", "sigmoid"] = "softmax"
    """MoE: how the router's logits become scores."""
    norm_topk_prob: bool = False
    """MoE: the weights of a token's experts are divided by their sum."""
    routed_scaling_factor: float = 1.0
    """MoE: multiplies the weights of the routed experts."""
    n_expert_groups: int = 1
    """MoE: groups of experts, a divisor of n_routed_experts."""
    n_activated_groups: int = 1
    """MoE: the groups that a token's experts come from."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            self._check_type(field.name, getattr(self, field.name), field.type)
        if self.n_kv_heads is None:
            object.__setattr__(self, "n_kv_heads", self.n_heads)
        self._check_windows()
        self._check_attention()
        self._check_feed_forward()

    def _check_type(self, name: str, value: object, annotation: object) -> None:
        positive = {"vocab_size", "dim", "n_layers", "dim_ffn", "max_len", "n_heads"}
        if name in positive and not (type(value) is int and value > 0):
            raise ValueError(f"{name} must be a positive integer, not {value!r}")
        if annotation is bool and not isinstance(value, bool):
            raise ValueError(f"{name} must be true or false, not {value!r}")
        if annotation is int and (type(value) is not int or value < 0):
            raise ValueError(f"{name} must be an integer of 0 or more, not {value!r}")
        if annotation == int | None and value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"{name} must be a positive integer or null, not {value!r}")
        if annotation is float and not (_is_number(value) and value > 0):
            raise ValueError(f"{name} must be a positive number, not {value!r}")
        choices = getattr(annotation, "__args__", ()) if "Literal" in str(annotation) else ()
        if choices and value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")

    def _check_windows(self) -> None:
        if self.rope_scaling is not None and not isinstance(self.rope_scaling, RopeScaling):
            raise ValueError(f"rope_scaling must be a mapping or null, not {self.rope_scaling!r}")
        layers = self.sliding_window_layers
        if layers is None:
            return
        object.__setattr__(self, "sliding_window_layers", tuple(layers))  # JSON has lists only
        if self.sliding_window is None:
            raise ValueError("sliding_window_layers needs a sliding_window")
        if not layers or any(type(n) is not int or not 0 <= n < self.n_layers for n in layers):
            raise ValueError(
                f"sliding_window_layers {list(layers)} must name blocks from 0 to "
                f"{self.n_layers - 1}"
            )

    def _check_attention(self) -> None:
        mla = {
            "kv_lora_rank": self.kv_lora_rank,
            "qk_nope_head_dim": self.qk_nope_head_dim,
            "qk_rope_head_dim": self.qk_rope_head_dim,
            "v_head_dim": self.v_head_dim,
        }
        if self.attn_type == "mla":
            missing = [name for name, value in mla.items() if not value]
            if missing:
                raise ValueError(f"attn_type mla needs {', '.join(missing)} above 0")
            if self.use_qk_norm:
                raise ValueError(
                    "use_qk_norm true contradicts attn_type mla: MLA normalises its latents, and a "
                    "norm on the heads would rule out the latent cache; set use_qk_norm: false"
                )
            if self.n_kv_heads != self.n_heads:
                raise ValueError(
                    f"n_kv_heads {self.n_kv_heads} contradicts attn_type mla, whose heads share "
                    "one latent; leave n_kv_heads out"
                )
            if self.head_dim is not None:
                raise ValueError(
                    f"head_dim {self.head_dim} contradicts attn_type mla; its widths are "
                    "qk_nope_head_dim, qk_rope_head_dim and v_head_dim"
                )
            if self.qk_rope_head_dim % 2:
                raise ValueError(f"qk_rope_head_dim {self.qk_rope_head_dim} must be even")
            return
        extra = [name for name, value in mla.items() if value]
        extra += ["q_lora_rank"] if self.q_lora_rank is not None else []
        extra += ["latent_norm_eps"] if self.latent_norm_eps != 1e-6 else []
        if extra:
            raise ValueError(f"{', '.join(extra)} are for attn_type mla, not gqa")
        if self.n_heads % self.num_kv_heads:
            raise ValueError(
                f"n_kv_heads {self.n_kv_heads} must divide n_heads {self.n_heads}: each key head "
                "serves the same number of query heads"
            )
        if self.head_dim is None:
            if self.dim % self.n_heads:
                raise ValueError(
                    f"dim {self.dim} is not a multiple of n_heads {self.n_heads}; "
                    "set head_dim or change one of them"
                )
            object.__setattr__(self, "head_dim", self.dim // self.n_heads)
        if self.query_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even: RoPE turns pairs of channels")

    def _check_feed_forward(self) -> None:
        if self.ffn_type == "moe":
            self._check_experts()
            return
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        extra = [name for name in _MOE_FIELDS if getattr(self, name) != defaults[name]]
        if extra:
            raise ValueError(f"{', '.join(extra)} are for ffn_type moe, not mlp")

    def _check_experts(self) -> None:
        needed = ("n_routed_experts", "n_activated_experts", "dim_ffn_expert")
        missing = [name for name in needed if not getattr(self, name)]
        if missing:
            raise ValueError(f"ffn_type moe needs {', '.join(missing)} above 0")
        if self.n_activated_experts > self.n_routed_experts:
            raise ValueError(
                f"n_activated_experts {self.n_activated_experts} exceeds n_routed_experts "
                f"{self.n_routed_experts}"
            )
        if self.first_k_dense >= self.n_layers:
            raise ValueError(
                f"first_k_dense {self.first_k_dense} leaves none of the n_layers {self.n_layers} "
                "for experts; use ffn_type mlp"
            )
        groups, chosen = self.n_expert_groups, self.n_activated_groups
        if self.moe_topk_method == "greedy" and (groups, chosen) != (1, 1):
            raise ValueError(
                f"n_expert_groups {groups} and n_activated_groups {chosen} contradict "
                "moe_topk_method greedy, which knows no groups"
            )
        if not 1 <= chosen <= groups or self.n_routed_experts % groups:
            raise ValueError(
                f"n_expert_groups {groups} must divide n_routed_experts {self.n_routed_experts}, "
                f"and n_activated_groups {chosen} must be from 1 to it"
            )
        per_group = self.n_routed_experts // groups
        if self.n_activated_experts > chosen * per_group:
            raise ValueError(
                f"n_activated_experts {self.n_activated_experts} exceeds the {per_group} experts "
                f"in each of n_activated_groups {chosen} groups"
            )
        if self.moe_topk_method == "noaux_tc" and per_group < 2:
            raise ValueError(
                f"n_expert_groups {groups} leaves one expert a group; noaux_tc ranks a group by "
                "its two best"
            )

    @property
    def num_kv_heads(self) -> int:
        """Key and value heads, never None."""
        return self.n_kv_heads or self.n_heads

    def window(self, layer: int) -> int | None:
        """How many tokens a token of a block sees, itself included; None is all."""
        layers = self.sliding_window_layers
        return self.sliding_window if layers is None or layer in layers else None

    @property
    def query_dim(self) -> int:
        """Width of one query head as it meets its key."""
        if self.attn_type == "mla":
            return self.qk_nope_head_dim + self.qk_rope_head_dim
        return self.head_dim or self.dim // self.n_heads

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        """What one token leaves in one layer's cache: (heads, key width, value width).

        A value width of 0 means that the values are the first entries of the key (MLA's latent).
        """
        if self.attn_type == "mla":
            return 1, self.kv_lora_rank + self.qk_rope_head_dim, 0
        return self.num_kv_heads, self.query_dim, self.query_dim

    def to_dict(self) -> dict[str, object]:
        """The fields, as `config.json` holds them."""
        return {"model_type": MODEL_TYPE, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, fields: dict[str, object]) -> "ModelConfig":
        """Build from `config.json`'s content.

        Raises:
            ValueError: an unknown field; the message suggests the nearest known one.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        given = {name: value for name, value in fields.items() if name not in _FOREIGN_KEYS}
        _refuse_unknown("model field", given, known)
        scaling = given.get("rope_scaling")
        if isinstance(scaling, dict):
            allowed = {field.name for field in dataclasses.fields(RopeScaling)}
            _refuse_unknown("rope_scaling field", scaling, allowed)
            try:
                given["rope_scaling"] = RopeScaling(**scaling)
            except TypeError as error:  # a required field is missing, and Python names it
                raise ValueError(f"rope_scaling: {error}") from error
        return cls(**given)  # pyright: ignore[reportArgumentType]

    @classmethod
    def load(cls, path: str | Path) -> "ModelConfig":
        """Read `config.json`, given itself or its folder."""
        file = Path(path)
        file = file / "config.json" if file.is_dir() else file
        return cls.from_dict(read_json(file))

    def save(self, path: str | Path) -> None:
        """Write `config.json`, given itself or its folder."""
        file = Path(path)
        file = file / "config.json" if file.is_dir() else file
        file.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")


def _refuse_unknown(kind: str, given: Mapping[str, object], known: set[str]) -> None:
    for name in given:
        if name not in known:
            raise ValueError(f"unknown {kind} {name!r}{did_you_mean(name, known)}")


def _is_number(value: object) -> TypeGuard[int | float]:
    return type(value) in (int, float) and math.isfinite(cast("float", value))


def read_json(file: Path) -> dict[str, object]:
    """Read a JSON object.

    Raises:
        ValueError: the file is not a JSON object; the message names it.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is not readable JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, not a {type(content).__name__}")
    return content
