"""One step on the real model: a ragged batch in, a token for each task that reached its end out.

N tokens of the step, flattened; R rows that sample; V tokens of the vocabulary.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from astrai_core.model import Transformer
from astrai_serve.engine.greedy import are_sound, most_likely
from astrai_serve.engine.kv_storage import KVStorage, Span
from astrai_serve.engine.native_attention import attention_of
from astrai_serve.engine.sampling import (
    Adjustments,
    Filters,
    counter_uniform,
    draw,
    log_probabilities,
    top_log_probabilities,
)
from astrai_serve.engine.scheduler import Chunk
from astrai_serve.engine.structured import TokenMasks
from astrai_serve.engine.task import SampledToken, Task, TokenLogprob

# below it, a draw is the most likely token to within a float's resolution
GREEDY_BELOW = 1e-5
# rows of a prompt's logits that are looked at together, so that no large copy is made
PROMPT_ROWS = 64


class Row(NamedTuple):
    """One token to be sampled."""

    task: Task
    guesses: tuple[int, ...] = ()
    """What the task is taken to have said behind its tokens."""


class Executor:
    """Runs steps; it keeps nothing of a task from one step to the next but tensors of constants.

    Args:
        model: the model, in evaluation mode; its weights are read in place.
        storage: keys and values.
    """

    def __init__(self, model: Transformer, storage: KVStorage):
        self.model = model
        self.storage = storage
        self._filters: tuple[list[int], Filters] | None = None
        self._masks = TokenMasks(model.config.vocab_size)

    @torch.inference_mode()
    def execute(self, chunks: Sequence[Chunk]) -> list[list[SampledToken | Exception]]:
        """Compute a step.

        Returns:
            For each chunk that samples the token that follows it, or an error where its logits are
            not numbers; and with a draft of d guesses, what follows 0 to d of them.
        """
        rows = [
            Row(chunk.task, chunk.draft[:n])
            for chunk in chunks
            if chunk.samples
            for n in range(len(chunk.draft) + 1)
        ]
        sampled = iter(self._sample(self.logits(chunks), rows))
        return [list(islice(sampled, len(c.draft) + 1)) if c.samples else [] for c in chunks]

    def logits(self, chunks: Sequence[Chunk]) -> Tensor:
        """Run the forward pass and return the logits (R, V) behind the chunks that sample.

        A chunk with a draft of d guesses has d + 1 rows.
        """
        input_ids: list[int] = []
        position_ids: list[int] = []
        logits_at: list[int] = []
        for chunk in chunks:
            input_ids += chunk.task.token_ids[chunk.start : chunk.start + chunk.num_known]
            input_ids += chunk.draft
            position_ids += range(chunk.start, chunk.start + chunk.length)
            if chunk.samples:
                logits_at += range(len(input_ids) - 1 - len(chunk.draft), len(input_ids))
        num_sampling = len(logits_at)
        of_prompt, first = [], 0
        for chunk in chunks:
            if places := _unknown_places(chunk):
                of_prompt.append((chunk.task, range(len(logits_at), len(logits_at) + len(places))))
                logits_at += [first + place - chunk.start for place in places]
            first += chunk.length
        spans = [
            Span(start=chunk.start, length=chunk.length, page_table=chunk.page_table)
            for chunk in chunks
        ]
        device = self.model.device
        output = self.model(
            torch.tensor(input_ids, device=device),
            torch.tensor(position_ids, device=device),
            attention_of(self.storage, spans),
            torch.tensor(logits_at, dtype=torch.int64, device=device),
        )
        logits = output["logits"]
        for task, rows in of_prompt:
            _record_prompt(task, logits[rows.start : rows.stop])
        return logits[:num_sampling]

    def _sample(self, logits: Tensor, places: list[Row]) -> list[SampledToken | Exception]:
        if not places:
            return []
        tasks = [place.task for place in places]
        adjustments = adjustments_of(places)
        adjusted = logits if adjustments is None else adjustments.apply(logits.float())
        structured = [n for n, task in enumerate(tasks) if task.matcher is not None]
        errors: dict[int, Exception] = {}
        if structured:
            adjusted, errors = self._masks.apply(adjusted, tasks, structured)
        drawing = [n for n, task in enumerate(tasks) if task.params.temperature >= GREEDY_BELOW]
        if len(drawing) == len(tasks):
            token_ids, is_sound = self._draw(adjusted, places, drawing), are_sound(adjusted)
        else:
            token_ids, is_sound = most_likely(adjusted)
            if drawing:
                drawn = self._draw(adjusted, [places[n] for n in drawing], drawing)
                token_ids[torch.tensor(drawing, device=logits.device)] = drawn
        wanted = [n for n, task in enumerate(tasks) if task.params.logprobs is not None]
        logprobs = _logprobs(logits, token_ids, tasks, wanted) if wanted else {}
        for n in (n for n, sound in enumerate(is_sound.tolist()) if not sound):
            errors.setdefault(n, FloatingPointError("the model's logits are not finite numbers"))
        return [
            errors.get(n) or SampledToken(token_id, logprobs.get(n))
            for n, token_id in enumerate(token_ids.tolist())
        ]

    def _draw(self, adjusted: Tensor, places: list[Row], rows: list[int]) -> Tensor:
        tasks = [place.task for place in places]
        ids = [task.task_id for task in tasks]
        if self._filters is None or self._filters[0] != ids:  # a batch often stays the same
            self._filters = (ids, filters_of(tasks, adjusted.shape[1], adjusted.device))
        uniform = [
            counter_uniform(task.seed, task.sample_index, task.num_tokens + len(guesses))
            for task, guesses in places
        ]
        if len(rows) < len(adjusted):
            adjusted = adjusted[torch.tensor(rows, device=adjusted.device)]
        uniform = torch.tensor(uniform, dtype=torch.float64, device=adjusted.device)
        return draw(adjusted, self._filters[1], uniform)


def filters_of(tasks: Sequence[Task], vocab_size: int, device: torch.device) -> Filters:
    """Columns of the tasks' sampling parameters."""
    params = [task.params for task in tasks]
    top_k = [min(p.top_k, vocab_size) or vocab_size for p in params]
    return Filters(
        temperature=torch.tensor([p.temperature for p in params], device=device),
        top_k=torch.tensor(top_k, device=device),
        top_p=torch.tensor([p.top_p for p in params], device=device),
        min_p=torch.tensor([p.min_p for p in params], device=device),
    )


def adjustments_of(rows: Sequence[Row]) -> Adjustments | None:
    """Penalties, biases and forbidden stop tokens of a batch; None if there are none."""
    entries: list[tuple[int, int, float, float]] = []
    for row, (task, guesses) in enumerate(rows):
        params = task.params
        if params.repetition_penalty != 1:
            seen = {*task.token_ids, *guesses}
            entries += [(row, token, params.repetition_penalty, 0.0) for token in seen]
        if params.presence_penalty or params.frequency_penalty:
            counts = Counter([*task.token_ids[task.num_prompt_tokens :], *guesses])
            presence, frequency = params.presence_penalty, params.frequency_penalty
            entries += [(row, t, 1.0, -presence - frequency * n) for t, n in counts.items()]
        entries += [(row, token, 1.0, bias) for token, bias in params.logit_bias]
        # a form may leave nothing but the end: its mask takes care of that
        num_output_tokens = task.num_output_tokens + len(guesses)
        if num_output_tokens < params.min_tokens and task.matcher is None:
            entries += [(row, token, 1.0, -torch.inf) for token in task.stop_ids]
    if not entries:
        return None
    places, tokens, repetition, bias = zip(*entries, strict=True)
    return Adjustments(row=places, token=tokens, repetition=repetition, bias=bias)


def _unknown_places(chunk: Chunk) -> range:
    """Positions of a chunk whose logits tell of prompt tokens of which they are wanted."""
    if not chunk.task.wants_prompt_logprobs:
        return range(0)
    end = min(chunk.start + chunk.length, chunk.task.num_prompt_tokens - 1)
    return range(max(chunk.start, len(chunk.task.prompt_logprobs)), end)


def _record_prompt(task: Task, logits: Tensor) -> None:
    """Note what logits (P, V) say of the next P prompt tokens."""
    count = task.params.prompt_logprobs or 0
    known = len(task.prompt_logprobs)
    ids = task.prompt_ids[known + 1 : known + 1 + len(logits)]
    for start in range(0, len(ids), PROMPT_ROWS):
        piece = ids[start : start + PROMPT_ROWS]
        rows = logits[start : start + PROMPT_ROWS].float()
        chosen = log_probabilities(rows, torch.tensor(piece, device=rows.device)).tolist()
        values, tops = top_log_probabilities(rows, count)
        task.prompt_logprobs += [
            TokenLogprob(
                token_id=token_id, logprob=logprob, top=tuple(zip(top, value, strict=True))
            )
            for token_id, logprob, top, value in zip(
                piece, chosen, tops.tolist(), values.tolist(), strict=True
            )
        ]


def _logprobs(
    logits: Tensor, token_ids: Tensor, tasks: Sequence[Task], wanted: list[int]
) -> dict[int, TokenLogprob]:
    """Log-probabilities before any adjustment, of the rows in `wanted`."""
    if len(wanted) < len(tasks):
        index = torch.tensor(wanted, device=logits.device)
        logits, token_ids = logits[index], token_ids[index]
    logits = logits.float()
    chosen = log_probabilities(logits, token_ids).tolist()
    counts = [tasks[row].params.logprobs or 0 for row in wanted]
    top_values, top_ids = [[]] * len(wanted), [[]] * len(wanted)
    if max(counts):
        values, ids = top_log_probabilities(logits, max(counts))
        top_values, top_ids = values.tolist(), ids.tolist()
    result: dict[int, TokenLogprob] = {}
    for n, (row, token_id) in enumerate(zip(wanted, token_ids.tolist(), strict=True)):
        top = tuple(zip(top_ids[n][: counts[n]], top_values[n][: counts[n]], strict=True))
        result[row] = TokenLogprob(token_id=token_id, logprob=chosen[n], top=top)
    return result
