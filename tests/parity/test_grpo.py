"""Three optimizer steps of GRPO as TRL's trainer takes them, on the same folder and completions.

What is generated is settled beforehand, since two engines never draw alike; everything after that
is compared: rewards, advantages by their effect, losses, gradients, and the weights' next step.
"""

import json
import logging
import math

import lightning as L
import pytest
import torch

from astrai_core.generation import Completion, FinishReason, GenerationEngine
from astrai_core.tokenizer import AutoTokenizer
from astrai_train.data.module import TokenDataModule
from astrai_train.losses.policy import PolicyConfig
from astrai_train.modules import GRPOModule
from astrai_train.rollout import RolloutConfig

pytestmark = pytest.mark.parity
STEPS, PROMPTS, GROUP, LONGEST = 3, 2, 4, 9
TEXTS = ["yes", "no, not today", "今天天气很好", "ok!", "the weather is fine", "我们去公园吧。"]
RECORDS = [
    {"prompt": [{"role": "user", "content": TEXTS[n % 6] * (1 + n % 2)}], "bonus": n % 3}
    for n in range(PROMPTS * STEPS)
]
POLICY = {"loss_type": "dapo", "scale_rewards": "group", "beta": 0.0, "temperature": 1.0}
# ours (policy, rollout, module) and TRL's
CASES = {
    **{
        name: ({"aggregation": name}, {}, {}, {"loss_type": name})
        for name in ("grpo", "bnpo", "dapo", "dr_grpo")
    },
    "scale batch": ({"advantage_scale": "batch"}, {}, {}, {"scale_rewards": "batch"}),
    "scale none": ({"advantage_scale": "none"}, {}, {}, {"scale_rewards": "none"}),
    "k3": (
        {"kl": "k3", "kl_weight": 0.3, "aggregation": "grpo"},
        {},
        {},
        {"beta": 0.3, "loss_type": "grpo"},
    ),
    "two updates": (
        {"clip_low": 0.1, "clip_high": 0.15, "max_ratio": 1.3},
        {},
        {"updates": 2},
        {"num_iterations": 2, "epsilon": 0.1, "epsilon_high": 0.15, "delta": 1.3},
    ),
    "temperature": (
        {"kl": "k3", "kl_weight": 0.1},
        {"temperature": 0.6},
        {},
        {"temperature": 0.6, "beta": 0.1},
    ),
    "masked": ({"mask_truncated": True}, {}, {}, {"mask_truncated_completions": True}),
}
_QUICK = ("grpo", "dr_grpo", "k3", "two updates")
NAMES = [pytest.param(name, marks=[] if name in _QUICK else [pytest.mark.slow]) for name in CASES]
RATE = 0.5


def settled(prompt_ids, sample: int, end: int, vocab: int) -> list[int]:
    """The completion of a prompt: up to LONGEST tokens, ended by `end` unless it is that long."""
    generator = torch.Generator().manual_seed(sum(prompt_ids) * 10 + sample)
    length = int(torch.randint(2, LONGEST + 1, (), generator=generator))
    ids = torch.randint(3, vocab, (length,), generator=generator).tolist()
    return ids if length == LONGEST else [*ids[:-1], end]


def by_ids(completion_ids, bonus, **_):
    return [sum(ids) % 5 + 0.1 * extra for ids, extra in zip(completion_ids, bonus, strict=True)]


def no_judge_of_even_lengths(completion_ids, **_):
    return [0.5 * len(ids) if len(ids) % 2 else None for ids in completion_ids]


class Settled(GenerationEngine):
    """Answers as `settled` says."""

    def __init__(self, end: int, vocab: int):
        self.end, self.vocab = end, vocab
        self.num_steps = 0

    def generate(self, prompts, params, between_steps=None):
        self.num_steps += 1
        completions = []
        for number, prompt in enumerate(prompts):
            ids = settled(prompt, number % GROUP, self.end, self.vocab)
            is_ended = ids[-1] == self.end
            completions.append(
                Completion(
                    token_ids=tuple(ids),
                    logprobs=(math.nan,) * len(ids),
                    finish_reason=FinishReason.STOP if is_ended else FinishReason.LENGTH,
                )
            )
        return completions

    def update_weights(self):
        pass

    def stats(self):
        return {"num_steps": self.num_steps, "prefix_cache_hits": 0}

    def close(self):
        pass


class PlainGRPO(GRPOModule):
    """With TRL's optimizer of this test; keeps what each step logs."""

    def __init__(self, **options):
        super().__init__(**options)
        self.steps: list[dict[str, float]] = []

    def configure_optimizers(self):
        return torch.optim.SGD(self.model.parameters(), lr=RATE)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        super().on_train_batch_end(outputs, batch, batch_idx)
        logged = self.trainer.callback_metrics
        self.steps.append({name: value.item() for name, value in logged.items()})


class InOrder(TokenDataModule):
    def train_dataloader(self):
        loader = self._loader(self.train_dataset, shuffle=False)
        loader.repeats = self.repeats
        return loader


@pytest.fixture(scope="module")
def folder(make_family, tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    folder = tmp_path_factory.mktemp("grpo")
    make_family("qwen3 tied", folder)
    AutoTokenizer.train(TEXTS * 9, 300).save_pretrained(folder)
    (folder / "prompts.jsonl").write_text("".join(json.dumps(one) + "\n" for one in RECORDS))
    return folder


def ours(folder, policy, rollout, options):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    end = tokenizer.eos_id
    assert end is not None
    module = PlainGRPO(
        engine=lambda model: Settled(end, tokenizer.vocab_size),
        rewards=[by_ids, no_judge_of_even_lengths],
        reward_weights=[1.0, 0.4],
        rollout=RolloutConfig(num_generations=GROUP, max_completion=LONGEST, **rollout),
        policy=PolicyConfig(**policy),
        init_from=folder,
        compile=False,
        **options,
    )
    L.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        max_epochs=-1,
        max_steps=STEPS,
        log_every_n_steps=1,
    ).fit(
        module,
        datamodule=InOrder(
            folder, folder / "prompts.jsonl", stage="grpo", window_size=64, batch_size=PROMPTS
        ),
    )
    return module.steps


def theirs(folder, options, out):
    import datasets
    import transformers
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    end = tokenizer.eos_id
    assert end is not None

    class Scripted(GRPOTrainer):
        def _generate_single_turn(self, prompt_ids, *_, **__):
            ids = [
                settled(prompt, number % GROUP, end, tokenizer.vocab_size)
                for number, prompt in enumerate(prompt_ids)
            ]
            return ids, None

    config = GRPOConfig(
        output_dir=str(out),
        learning_rate=RATE,
        lr_scheduler_type="constant",
        warmup_steps=0,
        optim="sgd",
        weight_decay=0.0,
        max_grad_norm=1e9,
        max_steps=STEPS,
        per_device_train_batch_size=PROMPTS * GROUP,
        gradient_accumulation_steps=1,
        steps_per_generation=1,
        num_generations=GROUP,
        max_completion_length=LONGEST,
        bf16=False,
        fp16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        torch_compile=False,
        seed=0,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_vllm=False,
        shuffle_dataset=False,
        disable_dropout=True,
        importance_sampling_level="token",
        multi_objective_aggregation="sum_then_normalize",
        top_entropy_quantile=1.0,
        entropy_coef=0.0,
        off_policy_mask_threshold=None,
        use_bias_correction_kl=False,
        sync_ref_model=False,
        reward_weights=[1.0, 0.4],
        **{"num_iterations": 1, "epsilon": 0.2, "epsilon_high": 0.2, "delta": None}
        | {"mask_truncated_completions": False}
        | POLICY
        | options,
    )
    trainer = Scripted(
        model=transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        args=config,
        reward_funcs=[by_ids, no_judge_of_even_lengths],
        train_dataset=datasets.Dataset.from_list(RECORDS),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder),
    )
    trainer.train()
    return [step for step in trainer.state.log_history if "grad_norm" in step]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_three_steps_are_those_of_trl(folder, tmp_path, name):
    policy, rollout, options, trl_options = CASES[name]
    wanted = theirs(folder, trl_options, tmp_path)
    got = ours(folder, policy, rollout, options)
    assert len(wanted) == len(got) == STEPS
    pairs = {
        "train/loss": "loss",
        "train/grad_norm": "grad_norm",
        "train/reward": "reward",
        "reward/by_ids": "rewards/by_ids/mean",
        "reward/by_ids_std": "rewards/by_ids/std",
        "reward/no_judge_of_even_lengths": "rewards/no_judge_of_even_lengths/mean",
        "train/frac_reward_zero_std": "frac_reward_zero_std",
        "rollout/length": "completions/mean_length",
        "rollout/truncated": "completions/clipped_ratio",
    }
    if policy.get("kl"):
        pairs["train/kl"] = "kl"
    for step, (one, other) in enumerate(zip(got, wanted, strict=True)):
        for mine, trls in pairs.items():
            if trls in other:  # what concerns a rollout is logged in its first step only
                assert one[mine] == pytest.approx(other[trls], rel=1e-4, abs=2e-5), (step, mine)
    assert len({round(one["train/grad_norm"], 6) for one in got}) == STEPS
