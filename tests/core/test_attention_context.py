"""Packing changes where tokens stand, never what they see."""

from typing import Any

import pytest
import torch

from astrai_core.model import ModelConfig, PackedAttention, Transformer

LENGTHS = (4, 1, 6)
ROW = 14  # the documents and three tokens of padding


def make(**fields):
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": 40,
        "dim": 32,
        "n_layers": 2,
        "dim_ffn": 48,
        "n_heads": 4,
    }
    model = Transformer(ModelConfig(**(shape | fields)))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def packed():
    """Ids, positions and document ids (1, 14) of the three documents and padding."""
    torch.manual_seed(1)
    ids = torch.randint(40, (1, ROW))
    ranges = [torch.arange(n) for n in (*LENGTHS, 3)]
    documents = torch.cat(
        [torch.full((n,), i) for n, i in zip((*LENGTHS, 3), (0, 1, 2, -1), strict=True)]
    )
    return ids, torch.cat(ranges)[None], documents[None]


@pytest.mark.parametrize(
    "fields",
    [
        {"n_kv_heads": 2},
        {"sliding_window": 3},
        {
            "attn_type": "mla",
            "use_qk_norm": False,
            "kv_lora_rank": 8,
            "qk_nope_head_dim": 4,
            "qk_rope_head_dim": 4,
            "v_head_dim": 6,
        },
    ],
    ids=["gqa", "window", "mla"],
)
def test_packed_equals_unpacked_in_logits_and_gradients(fields):
    model, (ids, positions, documents) = make(**fields), packed()
    together = model(ids, positions, PackedAttention.of_documents(documents))["logits"]
    assert together.isfinite().all()
    together[documents >= 0].square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    assert all(grad is not None and grad.isfinite().all() for grad in grads.values())

    model.zero_grad()
    alone = [model(part)["logits"] for part in ids[:, : sum(LENGTHS)].split(LENGTHS, dim=1)]
    torch.testing.assert_close(
        torch.cat(alone, 1), together[:, : sum(LENGTHS)], atol=1e-5, rtol=1e-5
    )
    torch.cat(alone, 1).square().sum().backward()
    torch.testing.assert_close(
        {name: p.grad for name, p in model.named_parameters()}, grads, atol=1e-4, rtol=1e-4
    )


def test_padding_is_finite_and_reaches_nobody():
    model, (ids, positions, documents) = make(), packed()
    documents = torch.cat((documents, torch.full_like(documents, -1)))
    context = PackedAttention.of_documents(documents)
    ids, positions = ids.repeat(2, 1), positions.repeat(2, 1)
    before = model(ids, positions, context)["logits"]
    changed = torch.where(documents >= 0, ids, (ids + 1) % 40)
    after = model(changed, positions, context)["logits"]
    assert before.isfinite().all()
    assert torch.equal(before[0, : sum(LENGTHS)], after[0, : sum(LENGTHS)])
    before[0, : sum(LENGTHS)].sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_one_document_a_row_is_plain_causal_attention():
    model, ids = make(), torch.randint(40, (3, 5))
    named = PackedAttention.of_documents(torch.zeros(3, 5, dtype=torch.int64))
    torch.testing.assert_close(model(ids, None, named)["logits"], model(ids)["logits"])


def test_values_may_be_the_beginning_of_the_key():
    q, k = torch.randn(6, 4, 5), torch.randn(6, 1, 5)
    context = PackedAttention.of_rows(2, 3)
    out = context.attend(0, q, k, 3, scale=0.5)
    assert out.shape == (6, 4, 3)
    assert torch.equal(out, context.attend(0, q, k, k[..., :3], scale=0.5))


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 1, 7, 150])
def test_documents_by_themselves_equal_masked_rows_in_outputs_and_gradients(num_kv_heads, window):
    lengths = ([300], [100, 199], [3, 1, 249, 20])  # some longer than a block, some padding
    documents = torch.full((3, 300), -1)
    for row, own in zip(documents, lengths, strict=True):
        row[: sum(own)] = torch.arange(len(own)).repeat_interleave(torch.tensor(own))
    heads = (4, num_kv_heads, num_kv_heads)
    inputs = [torch.randn(900, n, 8, requires_grad=True) for n in heads]
    out = PackedAttention.of_documents(documents).attend(0, *inputs, scale=0.3, window=window)

    place = torch.arange(300)
    distance = place[:, None] - place
    seen = (documents[:, :, None] == documents[:, None]) & (documents >= 0)[:, None]
    seen = (seen & (distance >= 0) & (distance < (window or 300))) | (distance == 0)
    q, k, v = (x.unflatten(0, (3, 300)).transpose(1, 2) for x in inputs)
    k, v = (x.repeat_interleave(4 // num_kv_heads, dim=1) for x in (k, v))
    scores = (0.3 * q @ k.mT).masked_fill(~seen[:, None], -torch.inf)
    wanted = (scores.softmax(-1) @ v).transpose(1, 2).flatten(0, 1)

    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-5)
    slope = torch.randn_like(out)
    torch.testing.assert_close(
        torch.autograd.grad(out, inputs, slope),
        torch.autograd.grad(wanted, inputs, slope),
        atol=2e-5,
        rtol=1e-4,
    )


def test_attention_inside_documents_is_a_sound_operator():
    inputs = [torch.randn(6, n, 4, requires_grad=True) for n in (4, 2, 2)]
    documents = torch.tensor([[0, 0, 1], [0, 0, -1]])
    torch.library.opcheck(
        torch.ops.astrai.document_attention.default, (*inputs, documents, 0.5, None)
    )
