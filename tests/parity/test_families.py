"""Every family against transformers' own classes: in fp32, through files, batched and served."""

import pytest
import torch
from torch import Tensor

from astrai_core.generation import SamplingParams
from astrai_core.model import AutoModel, PackedAttention
from astrai_serve import LLM
from astrai_serve.engine import EngineConfig
from astrai_serve.engine.core import EngineCore
from astrai_serve.engine.executor import Executor

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

VOCABULARY = 300
SMALL = EngineConfig(page_size=4, num_pages=64, max_step_tokens=64)


def assert_equal(ours: Tensor, theirs: Tensor, name: str = "") -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5, msg=lambda m: f"{name}: {m}")


def random_ids(*shape: int) -> Tensor:
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("is_training", [False, True], ids=["inference", "training"])
def test_logits_are_equal(family, is_training):
    """Latent attention has a form of its own for each."""
    ids = random_ids(2, 13)
    with torch.no_grad():
        ours = family.ours.train(is_training)(ids)["logits"]
        assert_equal(ours, family.theirs(ids).logits)


def test_gradients_are_equal(family):
    ids = random_ids(2, 13)
    for model in (family.theirs, family.ours.train()):
        model.zero_grad()
        out = model(ids)
        out["logits"].logsumexp(-1).sub(out["logits"][..., 7]).mean().backward()
    found = {name: p.grad for name, p in family.ours.named_parameters()}
    for name, parameter in family.theirs.named_parameters():
        name = name.removeprefix("model.")
        if name.endswith("experts.gate_up_proj"):
            ours = torch.cat((stacked(found, name, "gate"), stacked(found, name, "up")), dim=1)
        elif name.endswith("experts.down_proj"):
            ours = stacked(found, name, "down")
        else:
            ours = found.pop(name)
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0, f"{name} plays no part"
        assert_equal(ours, parameter.grad, name)
    assert not found, "a parameter of ours that theirs has not"


def stacked(found: dict[str, Tensor], name: str, which: str) -> Tensor:
    """The gradients of one matrix of all experts, taken out."""
    prefix, numbers = name.rpartition(".")[0], range(6)
    return torch.stack([found.pop(f"{prefix}.{n}.{which}_proj.weight") for n in numbers])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_are_equal(family, side):
    ids, lengths = random_ids(3, 12), [12, 5, 1]
    index = torch.arange(12)
    real = torch.stack([index >= 12 - n if side == "left" else index < n for n in lengths])
    positions = (real.cumsum(-1) - 1).clamp(min=0)
    context = PackedAttention.of_documents(real.long() - 1)
    with torch.no_grad():
        theirs = family.theirs(ids, attention_mask=real.long(), position_ids=positions).logits
        ours = family.ours.eval()(ids, positions, context)["logits"]
    assert ours.isfinite().all()
    assert_equal(ours[real], theirs[real])


def test_packed_documents_equal_each_alone(family):
    first, second = random_ids(1, 4), random_ids(1, 7)
    documents = torch.tensor([[0] * 4 + [1] * 7 + [-1] * 2])
    ids = torch.cat((first, second, random_ids(1, 2)), dim=1)
    positions = torch.tensor([[*range(4), *range(7), 0, 0]])
    with torch.no_grad():
        packed = family.ours.eval()(ids, positions, PackedAttention.of_documents(documents))
        alone = torch.cat((family.theirs(first).logits, family.theirs(second).logits), dim=1)
    assert_equal(packed["logits"][:, :11], alone)


@pytest.mark.parametrize("chunk", [1, 5, None], ids=lambda size: f"chunks of {size or 'all'}")
def test_paged_prefill_and_decode_give_the_same_logits(family, chunk):
    config = EngineConfig(
        page_size=4, num_pages=64, max_step_tokens=64, max_chunk_tokens=chunk, speculative_tokens=0
    )
    core = EngineCore.of_model(family.ours.eval(), None, config)
    seen: dict[int, list[Tensor]] = {0: [], 1: []}
    executor = core.executor
    assert isinstance(executor, Executor)
    logits_of = executor.logits

    def watched(chunks):
        logits = logits_of(chunks)
        rows = iter(logits)
        for one in chunks:
            if one.samples:
                seen[one.task.task_id].append(next(rows).clone())
        return logits

    executor.logits = watched
    params = SamplingParams(temperature=0, max_tokens=5)
    tasks = [
        core.new_task(n, random_ids(20)[n : n + length].tolist(), params)
        for n, length in enumerate((17, 3))
    ]
    for task in tasks:
        core.add(task)
    while core.has_tasks:
        core.step()
    for task in tasks:
        with torch.no_grad():
            theirs = family.theirs(torch.tensor([task.token_ids])).logits[0]
        ours = torch.stack(seen[task.task_id])
        assert_equal(ours, theirs[task.num_prompt_tokens - 1 : task.num_prompt_tokens + 4])


def test_greedy_generation_from_the_folder_is_equal(family):
    """The folder alone, as a user passes it: tokenizer, stop tokens and weights."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(family.folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(family.folder)
    llm = LLM(family.folder, config=SMALL)
    said: set[int] = set()
    for prompt in ("今天天气", "hello, the world"):
        ids = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        wanted = model.generate(**ids, max_new_tokens=14, do_sample=False)
        wanted = wanted[0, ids["input_ids"].shape[1] :].tolist()
        params = SamplingParams(temperature=0, max_tokens=14)
        assert llm.generate([prompt], params)[0].token_ids == tuple(wanted)
        said |= set(wanted)
    assert len(said) > 3, "a model that repeats itself shows nothing"


def test_a_folder_written_by_us_is_loaded_by_transformers(family, tmp_path):
    AutoModel.save_pretrained(family.ours, tmp_path / "ours")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(back) is type(family.theirs)
    back = dict(back.state_dict())
    for name, tensor in family.theirs.state_dict().items():
        assert torch.equal(back.pop(name), tensor), name
    assert not back
