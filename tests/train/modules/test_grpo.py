"""GRPO through the real engine, against plain torch on the same completions."""

import copy
import dataclasses
import json
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import Tensor

from astrai_core.model import AutoModel, ModelConfig, Transformer
from astrai_core.tokenizer import AutoTokenizer
from astrai_serve import LLM
from astrai_serve.engine import EngineConfig
from astrai_train.callbacks.throughput import Throughput
from astrai_train.data.loader import ResumableLoader
from astrai_train.data.module import TokenDataModule
from astrai_train.losses.policy import PolicyConfig
from astrai_train.modules import GRPOModule
from astrai_train.optim import OptimizerConfig
from astrai_train.rollout import RolloutConfig
from astrai_train.schedules import ScheduleConfig

from .gradients import assert_same_gradients

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
ROLLOUT = RolloutConfig(num_generations=4, max_completion=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tokenizer, a model, prompts, and the same prompts with stored responses."""
    folder = tmp_path_factory.mktemp("grpo")
    tokenizer = AutoTokenizer.train([f"say {word} 你好" for word in WORDS] * 5, 280)
    torch.manual_seed(0)
    shape = ModelConfig(
        vocab_size=tokenizer.vocab_size, dim=16, n_layers=1, dim_ffn=24, n_heads=2, max_len=64
    )
    AutoModel.save_pretrained(AutoModel.from_config(shape), folder)
    tokenizer.save_pretrained(folder)
    prompts = [{"prompt": f"say {word}", "word": word} for word in WORDS]
    stored = [
        record | {"responses": ["a", "bc", record["word"]], "rewards": [n % 3, 0.5, 2]}
        for n, record in enumerate(prompts)
    ]
    for name, records in (("prompts", prompts), ("stored", stored)):
        lines = [json.dumps(record) + "\n" for record in records]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


def engine(model: Transformer) -> LLM:
    return LLM(model, None, EngineConfig(page_size=4, num_pages=256))


def by_length(completion_ids, **_):
    """An arbitrary reward that differs between completions."""
    return [float(sum(ids) % 7) for ids in completion_ids]


class Recording(GRPOModule):
    """Keeps gradients of every optimizer step and all rollouts."""

    def __init__(self, folder, **options):
        online = {"engine": engine, "rewards": [by_length], "rollout": ROLLOUT}
        fixed = {"compile": False, "schedule": ScheduleConfig(warmup_steps=0)}
        optimizer = OptimizerConfig(lr=options.pop("lr", 1e-12))
        super().__init__(init_from=folder, **{**online, **fixed, "optimizer": optimizer, **options})
        self.gradients: list[dict[str, Tensor]] = []
        self.rollouts = []

    def configure_gradient_clipping(self, optimizer, *args, **kwargs):
        super().configure_gradient_clipping(optimizer, *args, **kwargs)
        names = self.model.named_parameters()
        self.gradients.append({name: p.grad.clone() for name, p in names if p.grad is not None})
        if self._rollout is not None and self._rollout not in self.rollouts:
            self.rollouts.append(self._rollout)


def data(folder, stage="prompts", batch_size=8) -> TokenDataModule:
    file = folder / f"{stage}.jsonl"
    return TokenDataModule(
        folder, file, file, stage="grpo", window_size=32, batch_size=batch_size, test=file
    )


def trainer(**options) -> L.Trainer:
    return L.Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": 1,
            "max_epochs": -1,
            "limit_val_batches": 0,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "use_distributed_sampler": False,
            "num_sanity_val_steps": 0,
        }
        | options
    )


def fit(folder, stage="prompts", batch_size=8, trainer_options=None, **options) -> Recording:
    module = Recording(folder, **options)
    trainer(**trainer_options or {}).fit(module, datamodule=data(folder, stage, batch_size))
    return module


def plain_gradients(folder, rollout, aggregation="dapo") -> dict[str, Tensor]:
    """Minus advantage times log-probability, one completion at a time."""
    model = AutoModel.from_pretrained(folder, torch.float32)
    terms, start = [], 0
    for number in range(rollout.num_completions):
        prompt = int(rollout.prompt_lengths[number])
        length = prompt + int(rollout.completion_lengths[number])
        ids = rollout.tokens[start : start + length]
        start += length
        logprobs = model(ids[None])["logits"][0].log_softmax(-1)
        chosen = logprobs[prompt - 1 : -1].gather(1, ids[prompt:, None])[:, 0]
        terms.append(-rollout.advantages[number].float() * chosen)
    tokens = sum(map(len, terms))
    total = {
        "grpo": torch.stack([term.mean() for term in terms]).mean(),
        "bnpo": torch.cat(terms).sum() / tokens,
        "dapo": torch.cat(terms).sum() / tokens,
        "dr_grpo": torch.cat(terms).sum() / (len(terms) * ROLLOUT.max_completion),
    }[aggregation]
    total.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("aggregation", "pieces", "accumulate"),
    [
        ("dapo", 1, 1),
        ("dapo", None, 4),
        ("dapo", 8, 8),
        ("grpo", None, 4),
        ("bnpo", None, 4),
        ("dr_grpo", None, 4),
    ],
)
def test_a_step_is_the_policy_gradient_however_it_is_cut(folder, aggregation, pieces, accumulate):
    module = fit(
        folder,
        trainer_options={"accumulate_grad_batches": accumulate},
        policy=PolicyConfig(aggregation=aggregation),
        micro_batches=pieces,
    )
    (rollout,) = module.rollouts
    assert rollout.num_completions == 32
    assert len({*rollout.completion_lengths.tolist()}) > 1
    assert_same_gradients(module.gradients[0], plain_gradients(folder, rollout, aggregation))


def test_the_engine_scores_what_it_samples_as_training_does(folder, tmp_path):
    """Two rollouts over weights that a large step has moved between them."""
    run = trainer(max_steps=2, log_every_n_steps=1, callbacks=[Throughput()])
    module = Recording(folder, lr=0.1)
    before = copy.deepcopy(module.model.state_dict())
    run.fit(module, datamodule=data(folder))
    assert (module.model.embed_tokens.weight - before["embed_tokens.weight"]).abs().max() > 0.05
    metrics = run.callback_metrics
    assert metrics["rollout/mismatch"] < 1e-4
    assert metrics["rollout/engine_steps"] >= ROLLOUT.max_completion
    assert metrics["train/tokens_per_s"] > 0
    assert module.tokens_read <= len(module.rollouts[-1].tokens)
    first, second = module.rollouts
    assert first.tokens.tolist() != second.tokens.tolist()


def test_answers_in_bytes_are_told_from_the_trained_policys(folder):
    rollout = dataclasses.replace(ROLLOUT, weights="w8a8")
    run = trainer(log_every_n_steps=1)
    run.fit(Recording(folder, rollout=rollout), datamodule=data(folder))
    mismatch = run.callback_metrics["rollout/mismatch"]
    assert 1e-4 < mismatch < 0.1  # without rounding it is below


def test_a_rollout_is_gone_over_again_under_its_first_log_probabilities(folder):
    """Two passes of two steps: four steps of one rollout, then another one."""
    module = fit(folder, trainer_options={"max_steps": 5}, micro_batches=2, updates=2, lr=0.01)
    first, second = module.rollouts
    assert first.num_taken == 4
    assert second.num_taken == 1
    teaches = first.advantages != 0
    known = torch.repeat_interleave(teaches, first.completion_lengths)
    torch.testing.assert_close(
        first.old_logprobs[known], first.sampled_logprobs[known], atol=1e-4, rtol=0
    )
    assert first.old_logprobs[~known].isnan().all()


def test_stored_responses_give_the_gradient_of_their_advantages(folder):
    module = fit(folder, "stored", engine=None, rewards=None)
    model = AutoModel.from_pretrained(folder, torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    terms = []
    for line in (folder / "stored.jsonl").read_text().splitlines():
        record = json.loads(line)
        rewards = torch.tensor(record["rewards"], dtype=torch.float64)
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        for response, advantage in zip(record["responses"], advantages, strict=True):
            messages = [
                {"role": "user", "content": record["prompt"]},
                {"role": "assistant", "content": response},
            ]
            ids, trained = tokenizer.encode_chat_with_mask(messages)
            logprobs = model(torch.tensor([ids]))["logits"][0].log_softmax(-1)
            shifted = torch.tensor(ids)[1:, None]
            chosen = logprobs[:-1].gather(1, shifted)[:, 0][torch.tensor(trained)[1:]]
            terms.append(-advantage.float() * chosen)
    torch.cat(terms).mean().backward()
    assert_same_gradients(
        module.gradients[0],
        {name: p.grad for name, p in model.named_parameters() if p.grad is not None},
    )


def test_equal_rewards_move_nothing(folder):
    module = fit(folder, rewards=[lambda completions: [1.0] * len(completions)])
    assert all(not gradient.any() for gradient in module.gradients[0].values())


def test_masked_completions_weigh_nothing(folder):
    """With a stop token that hardly comes, every completion is cut off."""
    cut = RolloutConfig(num_generations=4, max_completion=1)
    module = fit(folder, rollout=cut, policy=PolicyConfig(mask_truncated=True))
    assert module.rollouts[0].num_trained_tokens < 32
    stopped = module.rollouts[0].is_trained.any()
    assert stopped == any(gradient.any() for gradient in module.gradients[0].values())


def test_the_reference_is_the_first_model_until_it_is_synced(folder):
    policy = PolicyConfig(kl="k3", kl_weight=0.1)
    run = trainer(max_steps=2, log_every_n_steps=1)
    module = Recording(folder, lr=0.01, policy=policy)
    run.fit(module, datamodule=data(folder))
    assert run.callback_metrics["train/kl"] > 1e-3
    assert not [name for name in module.state_dict() if "reference" in name]
    run = trainer(max_steps=2, log_every_n_steps=1)
    synced = PolicyConfig(kl="k3", kl_weight=0.1, sync_interval=1)
    run.fit(Recording(folder, lr=0.01, policy=synced), datamodule=data(folder))
    assert run.callback_metrics["train/kl"] == pytest.approx(0, abs=1e-5)


def test_the_seeds_form_is_the_ratio_to_a_reference(folder):
    """At the first step the reference is the policy, so that the gradient is the same."""
    policy = PolicyConfig(ratio_to="reference", sync_interval=5, kl="mse", kl_weight=0.1)
    module = fit(folder, policy=policy)
    assert_same_gradients(module.gradients[0], plain_gradients(folder, module.rollouts[0]))


def test_what_is_paid_for_becomes_the_answer(folder):
    """The share of the first twenty tokens among a completion's, one fourteenth at first."""

    def wanted(completion_ids, **_):
        return [sum(i < 20 for i in ids) / len(ids) for ids in completion_ids]

    module = Recording(folder, rewards=[wanted], lr=0.05)
    datamodule = data(folder)
    run = trainer(max_steps=25, log_every_n_steps=5)
    run.fit(module, datamodule=datamodule)
    assert run.callback_metrics["train/reward"] > 0.8
    (result,) = run.test(module, datamodule=datamodule, verbose=False)
    assert result["test/reward"] > 0.8
    assert result["test/reward/wanted"] == result["test/reward"]


def test_predictions_are_records_with_their_answers(folder):
    module = Recording(folder)
    datamodule = data(folder)
    module.tokenizer = datamodule.tokenizer
    loader = datamodule.val_dataloader()
    assert isinstance(loader, ResumableLoader)
    batch = next(iter(loader))
    lines = module.predict_step(batch, 0)
    assert [line["word"] for line in lines] == WORDS
    assert {"completion", "reward", "rewards"} <= lines[0].keys()
    assert lines[0]["rewards"]["by_length"] == lines[0]["reward"]


@pytest.mark.dist
def test_ranks_whose_rollouts_differ_stay_in_step(folder, tmp_path):
    """Three prompts on two ranks and answers of any length: together they are one step."""
    file = tmp_path / "saved.pt"

    class Saving(Recording):
        def on_train_end(self):
            torch.save((self.gradients[0], self.rollouts), file.with_suffix(f".{self.global_rank}"))

    few = tmp_path / "few.jsonl"
    few.write_text("".join((folder / "prompts.jsonl").read_text().splitlines(True)[:3]))
    datamodule = TokenDataModule(folder, few, stage="grpo", window_size=32, batch_size=2)
    policy = PolicyConfig(advantage_scale="batch")
    run = trainer(devices=2, strategy="ddp_fork", accumulate_grad_batches=2, max_steps=3)
    run.fit(Saving(folder, policy=policy), datamodule=datamodule)
    saved = [torch.load(file.with_suffix(f".{rank}"), weights_only=False) for rank in (0, 1)]
    assert [one[1][0].num_completions for one in saved] == [8, 4]
    assert_same_gradients(saved[0][0], saved[1][0])
    parts, counts = [], []
    for _, rollouts in saved:
        rollout = rollouts[0]
        parts.append(plain_gradients(folder, rollout))
        counts.append(rollout.num_trained_tokens)
    joined = {
        name: (parts[0][name] * counts[0] + parts[1][name] * counts[1]) / sum(counts)
        for name in parts[0]
    }
    assert_same_gradients(saved[0][0], joined)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rewards": None}, "engine and rewards belong together"),
        ({"reward_weights": [1.0, 2.0]}, "reward_weights has 2 numbers for 1 rewards"),
        ({"updates": 0}, "updates and micro_batches must be at least 1"),
    ],
)
def test_contradictions_are_refused(folder, options, message):
    with pytest.raises(ValueError, match=message):
        Recording(folder, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl": "k3"}, r"policy\.kl k3 and policy\.kl_weight 0"),
        ({"kl_weight": 1.0}, r"policy\.kl none and policy\.kl_weight 1"),
        ({"clip_low": 2.0}, r"policy\.clip_low must be from 0 to 1"),
        ({"max_ratio": 1.0}, r"policy\.max_ratio 1\.0 must be at least 1"),
        ({"sync_interval": 3}, r"policy\.sync_interval 3 needs a reference"),
    ],
)
def test_a_policy_that_makes_no_sense_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        PolicyConfig(**options)


def test_pieces_must_fill_optimizer_steps(folder):
    with pytest.raises(ValueError, match=r"micro_batches 3 must be a multiple of .* 2"):
        fit(folder, trainer_options={"accumulate_grad_batches": 2}, micro_batches=3)


def test_a_prompt_without_room_for_an_answer_is_refused(folder):
    with pytest.raises(ValueError, match=r"a prompt cannot be answered: .*context of 64 tokens"):
        fit(folder, rollout=RolloutConfig(max_completion=64))


def test_prompts_alone_need_an_engine(folder):
    with pytest.raises(ValueError, match="prompts without responses: set engine and rewards"):
        fit(folder, engine=None, rewards=None)
