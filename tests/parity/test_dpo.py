"""Three optimizer steps of DPO as TRL's trainer takes them, on the same folder and data."""

import json
import logging

import lightning as L
import pytest
import torch

from astrai_core.tokenizer import AutoTokenizer
from astrai_train.data.module import TokenDataModule
from astrai_train.modules.dpo import DPOModule, PreferenceConfig

pytestmark = pytest.mark.parity
LEARNING_RATE, BETA, STEPS = 0.05, 0.3, 3
# TRL counts all that follows an answer as part of it, so nothing does
TEMPLATE = """\
{%- for message in messages -%}
{{- "<|im_start|>" ~ message.role ~ "\\n" ~ message.content ~ "<|im_end|>" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ "<|im_start|>assistant\\n" }}{%- endif -%}
"""
ANSWERS = ["yes", "no, not today", "今天天气很好", "ok!", "the weather is fine", "我们去公园吧。"]
PAIRS = [
    {
        "prompt": [{"role": "user", "content": "hi" * (1 + n % 3)}],
        "chosen": [{"role": "assistant", "content": ANSWERS[n % 6]}],
        "rejected": [{"role": "assistant", "content": ANSWERS[(2 * n + 1) % 6] + " " * (n % 2)}],
    }
    for n in range(4 * STEPS)
]
# ours, TRL's, pairs of a micro-batch: TRL has cDPO only in a loss that sorts within the batch
LOSSES = {
    "sigmoid": ({}, {}, 2),
    "cDPO": ({"label_smoothing": 0.2}, {"loss_type": ["aot"], "label_smoothing": 0.2}, 1),
    "robust": (
        {"loss": "robust", "label_smoothing": 0.2},
        {"loss_type": ["robust"], "label_smoothing": 0.2},
        2,
    ),
    **{
        name: ({"loss": name}, {"loss_type": [name]}, 2)
        for name in ("ipo", "sigmoid_norm", "hinge", "apo_zero", "apo_down")
    },
}


_QUICK = ("sigmoid", "cDPO", "robust", "ipo")
_SLOW = pytest.mark.slow
FAMILIES = ("qwen3 tied", "llama tied")
CASES = [
    pytest.param(name, family, marks=[] if family == FAMILIES[0] and name in _QUICK else [_SLOW])
    for name in LOSSES
    for family in FAMILIES
]


@pytest.fixture(scope="module")
def folders(make_family, tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    folders = {}
    for family in FAMILIES:
        folders[family] = folder = tmp_path_factory.mktemp("dpo")
        make_family(family, folder)
        AutoTokenizer.train(ANSWERS * 9, 300, chat_template=TEMPLATE).save_pretrained(folder)
        (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    return folders


class PlainDPO(DPOModule):
    """With TRL's optimizer of this test; keeps what each step logs."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.steps: list[dict[str, float]] = []

    def configure_optimizers(self):
        return torch.optim.SGD(self.model.parameters(), lr=LEARNING_RATE)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        super().on_train_batch_end(outputs, batch, batch_idx)
        if self.trainer.global_step > len(self.steps):
            logged = self.trainer.callback_metrics
            self.steps.append({name: value.item() for name, value in logged.items()})


class InOrder(TokenDataModule):
    def train_dataloader(self):
        return self._loader(self.train_dataset, shuffle=False)


def ours(folder, options, batch_size):
    module = PlainDPO(PreferenceConfig(beta=BETA, **options), init_from=folder, compile=False)
    L.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        max_epochs=1,
        accumulate_grad_batches=4 // batch_size,
        log_every_n_steps=1,
    ).fit(
        module,
        datamodule=InOrder(
            folder, folder / "pairs.jsonl", stage="dpo", window_size=64, batch_size=batch_size
        ),
    )
    return module.steps


def theirs(folder, options, batch_size, out):
    import datasets
    import transformers
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    config = DPOConfig(
        output_dir=str(out),
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        warmup_steps=0,
        optim="sgd",
        weight_decay=0.0,
        max_grad_norm=1e9,
        num_train_epochs=1,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=4 // batch_size,
        average_tokens_across_devices=False,
        train_sampling_strategy="sequential",
        dataloader_drop_last=False,
        bf16=False,
        fp16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        torch_compile=False,
        seed=0,
        logging_steps=1,
        logging_first_step=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        beta=BETA,
        **{"loss_type": ["sigmoid"], "label_smoothing": 0.0} | options,
        loss_weights=None,
        f_divergence_type="reverse_kl",
        ld_alpha=None,
        use_weighting=False,
        disable_dropout=True,
        max_length=None,
        padding_free=False,
        precompute_ref_log_probs=False,
        sync_ref_model=False,
        router_aux_loss_coef=None,
    )
    trainer = DPOTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        args=config,
        train_dataset=datasets.Dataset.from_list(PAIRS),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder),
    )
    trainer.train()
    return [step for step in trainer.state.log_history if "grad_norm" in step]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "family"), CASES)
def test_three_steps_are_those_of_trl(folders, tmp_path, name, family):
    folder = folders[family]
    options, trl_options, batch_size = LOSSES[name]
    wanted = theirs(folder, trl_options, batch_size, tmp_path)
    got = ours(folder, options, batch_size)
    assert len(wanted) == len(got) == STEPS
    for step, (one, other) in enumerate(zip(got, wanted, strict=True)):
        pairs = {"train/loss": "loss", "train/grad_norm": "grad_norm"} | {
            key: key
            for key in (
                "rewards/chosen",
                "rewards/rejected",
                "rewards/margins",
                "rewards/accuracies",
                "logps/chosen",
                "logps/rejected",
            )
        }
        if step == 0:  # zero but for rounding, whose sign says nothing
            del pairs["rewards/accuracies"]
        for mine, its in pairs.items():
            assert one[mine] == pytest.approx(float(other[its]), rel=1e-4, abs=5e-5), (step, its)
    assert abs(got[-1]["rewards/margins"]) > 1e-3
