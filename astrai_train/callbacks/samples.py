"""Text on the way: what the model says while it is trained."""

import dataclasses
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from astrai_core.model import Transformer
from astrai_core.tokenizer import AutoTokenizer
from astrai_train.modules.base import LMModule
from astrai_train.report.history import SAMPLES, Sample, read_samples


class Samples(Callback):
    """Prints how the model goes on from given prompts, greedily, so nothing is drawn.

    The run's folder keeps them too, in `samples.jsonl`, for its report.

    Args:
        prompts: Texts to continue, or conversations to answer: lists of role and content.
        every_n_steps: Optimizer steps between two prints.
        max_new_tokens: The most tokens of an answer.
    """

    def __init__(
        self,
        prompts: list[str | list[dict[str, str]]],
        every_n_steps: int = 500,
        max_new_tokens: int = 48,
    ) -> None:
        for name, value in {
            "every_n_steps": every_n_steps,
            "max_new_tokens": max_new_tokens,
        }.items():
            if value < 1:
                raise ValueError(f"{name} of Samples must be 1 or more, not {value}")
        if not all(prompts):
            raise ValueError("prompts of Samples must not be empty: a model goes on from something")
        self._prompts = prompts
        self._every_n_steps = every_n_steps
        self._max_new_tokens = max_new_tokens
        self._encoded: list[list[int]] = []
        self._last_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Encode the prompts, so that a bad one is found before the first step."""
        model, tokenizer = _parts(pl_module)
        self._encoded = [encode_prompt(tokenizer, prompt) for prompt in self._prompts]
        for prompt, ids in zip(self._prompts, self._encoded, strict=True):
            if len(ids) >= model.config.max_len:
                raise ValueError(
                    f"the prompt {str(prompt)[:40]!r} of Samples has {len(ids)} tokens and leaves "
                    f"no room within the model's max_len {model.config.max_len}"
                )
        self._last_step = trainer.global_step
        if trainer.is_global_zero and not _is_dry(trainer):
            _rewind(_file(trainer), trainer.global_step)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Print where a step makes it due."""
        del outputs, batch, batch_idx
        step = trainer.global_step
        if step == self._last_step or step % self._every_n_steps:
            return
        self._last_step = step
        if not trainer.is_global_zero:
            return
        model, tokenizer = _parts(pl_module)
        lines = [f"samples after step {step}"]
        samples: list[Sample] = []
        for prompt, ids in zip(self._prompts, self._encoded, strict=True):
            new = continue_greedily(model, ids, self._max_new_tokens, tokenizer.stop_ids)
            shown = prompt if isinstance(prompt, str) else prompt[-1].get("content", "")
            samples.append(Sample(step=step, prompt=shown, text=tokenizer.decode(new)))
            lines.append(f"  {shown} -> {samples[-1].text}")
        pl_module.print("\n".join(lines))
        if not _is_dry(trainer):
            _append(_file(trainer), samples)


def _is_dry(trainer: Trainer) -> bool:
    # Lightning sets it from afar, where a type checker does not see it
    return bool(trainer.fast_dev_run)  # pyright: ignore[reportAttributeAccessIssue]


def _file(trainer: Trainer) -> Path:
    return Path(trainer.default_root_dir) / SAMPLES


def _append(file: Path, samples: Sequence[Sample]) -> None:
    lines = [json.dumps(dataclasses.asdict(one), ensure_ascii=False) + "\n" for one in samples]
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as output:
        output.writelines(lines)


def _rewind(file: Path, step: int) -> None:
    """Forget samples of steps that a resumed run will do again, and half a line of a killed one."""
    if file.is_file():
        kept = [one for one in read_samples(file) if one.step <= step]
        file.unlink()
        _append(file, kept)


def encode_prompt(tokenizer: AutoTokenizer, prompt: str | list[dict[str, str]]) -> list[int]:
    """Ids of a text to continue, or of a conversation up to where its answer begins."""
    if isinstance(prompt, str):
        return tokenizer.encode(prompt)
    return tokenizer.apply_chat_template(prompt)


def continue_greedily(
    model: Transformer, ids: Sequence[int], max_new_tokens: int, stop_ids: Collection[int]
) -> list[int]:
    """Take the likeliest token again and again, recomputing everything: for a few short texts.

    The model comes back as it was: modes are restored one by one, since parts of it may be frozen.

    Returns:
        The new ids, without the stop token that ended them.
    """
    modes = [(module, module.training) for module in model.modules()]
    device = model.embed_tokens.weight.device
    tokens = list(ids)
    end = min(len(tokens) + max_new_tokens, model.config.max_len)
    model.eval()
    try:
        with torch.no_grad():
            while len(tokens) < end:
                last = torch.tensor([len(tokens) - 1], device=device)
                logits = model(torch.tensor([tokens], device=device), logits_at=last)["logits"]
                token = int(logits.argmax())
                if token in stop_ids:
                    break
                tokens.append(token)
    finally:
        for module, training in modes:
            module.training = training
    return tokens[len(ids) :]


def _parts(module: LightningModule) -> tuple[Transformer, AutoTokenizer]:
    assert isinstance(module, LMModule)
    if module.tokenizer is None:
        raise ValueError("Samples needs a tokenizer, and this run's data module has none")
    return module.model, module.tokenizer
