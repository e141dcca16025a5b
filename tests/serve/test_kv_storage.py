"""The paged operator against dense attention with an explicit mask."""

import pytest
import torch
from torch import Tensor

from astrai_core.model import ModelConfig, PackedAttention, Transformer
from astrai_serve.engine import kv_storage
from astrai_serve.engine.kv_storage import KVStorage, PagedAttention, Span

GQA = ModelConfig(
    vocab_size=64, dim=32, n_layers=2, dim_ffn=48, n_heads=4, n_kv_heads=2, head_dim=8
)
MLA = ModelConfig(
    vocab_size=64,
    dim=32,
    n_layers=2,
    dim_ffn=48,
    n_heads=4,
    attn_type="mla",
    use_qk_norm=False,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=12,
)
TABLES = {"one run": [2, 3, 4, 5], "broken": [5, 1, 2, 7], "backwards": [6, 5, 4, 3]}


def dense(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    """Causal attention of (T, H, D) written out."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    index = torch.arange(q.shape[0])
    distance = index[:, None] - index
    hidden = (distance < 0) | (distance >= (window or len(index)))
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
@pytest.mark.parametrize("chunks", [[13], [5, 8], [1] * 13, [4, 1, 1, 7]], ids=str)
@pytest.mark.parametrize("window", [None, 3, 6])
@pytest.mark.parametrize("config", [GQA, MLA], ids=["gqa", "mla"])
def test_chunks_attend_as_the_whole(table, chunks, window, config):
    torch.manual_seed(0)
    heads, key_dim, value_dim = config.cache_shape
    storage = KVStorage(config, num_pages=8, page_size=4)
    q, k = torch.randn(13, config.n_heads, key_dim), torch.randn(13, heads, key_dim)
    v = torch.randn(13, heads, value_dim) if value_dim else k[..., : config.kv_lora_rank]
    parts, start = [], 0
    for length in chunks:
        step = slice(start, start + length)
        context = PagedAttention.build(
            storage, [Span(start=start, length=length, page_table=table)]
        )
        values = v[step] if value_dim else config.kv_lora_rank
        parts.append(context.attend(1, q[step], k[step], values, scale=0.3, window=window))
        start += length
    torch.testing.assert_close(torch.cat(parts), dense(q, k, v, 0.3, window), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("config", [GQA, MLA], ids=["gqa", "mla"])
def test_a_ragged_step_equals_the_full_forward(config):
    torch.manual_seed(0)
    model = Transformer(config).eval()
    storage = KVStorage(config, num_pages=8, page_size=4)
    rows = [torch.randint(64, (length,)) for length in (9, 6, 4)]
    tables = [[0, 1, 2], [3, 7], [5, 6]]
    before, now = (3, 5, 0), (6, 1, 4)  # a chunk, a decode step and a fresh prompt

    def step(starts, lengths):
        spans = [
            Span(start=s, length=n, page_table=t)
            for s, n, t in zip(starts, lengths, tables, strict=True)
            if n
        ]
        cut = [(row, s, s + n) for row, s, n in zip(rows, starts, lengths, strict=True)]
        return model(
            torch.cat([row[a:b] for row, a, b in cut]),
            torch.cat([torch.arange(a, b) for _, a, b in cut]),
            PagedAttention.build(storage, spans),
        )["logits"]

    with torch.no_grad():
        step((0, 0, 0), before)
        got = step(before, now)
        wanted = [model(row[None])["logits"][0, s:] for row, s in zip(rows, before, strict=True)]
    torch.testing.assert_close(got, torch.cat(wanted), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", [GQA, MLA], ids=["gqa", "mla"])
def test_the_model_compiles_around_the_operator_without_a_break(config):
    torch.manual_seed(0)
    model = Transformer(config).eval()
    ids, positions = torch.randint(64, (5,)), torch.arange(5)
    outputs = []
    for run in (
        model.hidden_states,
        torch.compile(model.hidden_states, fullgraph=True, backend="aot_eager"),
    ):
        storage = KVStorage(config, num_pages=2, page_size=4)
        context = PagedAttention.build(storage, [Span(start=0, length=5, page_table=[0, 1])])
        with torch.inference_mode():
            outputs.append((run(ids, positions, context), storage.keys[1].clone()))
    torch.testing.assert_close(outputs[0], outputs[1])


def test_mla_builds_heads_in_training_and_reads_the_latent_in_serving():
    torch.manual_seed(0)
    model, ids = Transformer(MLA), torch.randint(64, (2, 7))
    documents = PackedAttention.of_documents(torch.tensor([[0] * 7, [0] * 3 + [1] * 4]))
    heads = model.train()(ids, attention=documents)["logits"]
    latent = model.eval()(ids, attention=documents)["logits"]
    torch.testing.assert_close(heads, latent, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("config", [GQA, MLA], ids=["gqa", "mla"])
def test_decoding_tasks_attend_together_as_they_do_alone(monkeypatch, config, window):
    torch.manual_seed(0)
    heads, key_dim, value_dim = config.cache_shape
    storage = KVStorage(config, num_pages=8, page_size=4)
    for cache in (storage.keys[0], storage.values[0]):
        if cache is not None:
            cache.normal_()
    q, k = torch.randn(5, config.n_heads, key_dim), torch.randn(5, heads, key_dim)
    v = torch.randn(5, heads, value_dim) if value_dim else config.kv_lora_rank
    tables = [(8, 1, [7, 0, 3]), (2, 2, [6]), (0, 1, [5]), (11, 1, [4, 2, 1])]
    spans = [Span(start=s, length=n, page_table=t) for s, n, t in tables]

    def attend():
        context = PagedAttention.build(storage, spans)
        return context, context.attend(0, q, k, v, scale=0.3, window=window)

    together, got = attend()
    monkeypatch.setattr(kv_storage, "GATHERED_BYTES", 0)
    alone, wanted = attend()
    assert [len(context.gathered[0]) for context in (together, alone)] == [3, 0]
    torch.testing.assert_close(got, wanted, atol=2e-6, rtol=1e-5)
