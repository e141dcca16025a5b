"""Drawing against the processors of transformers, and its random numbers against statistics.

`draw` is an inverse distribution function of one number, so a fine grid of numbers shows the whole
distribution: a token of probability p is drawn p x (grid) times, to within one.
"""

import importlib
import math
from typing import Any

import numpy as np
import pytest
import torch

from astrai_core.generation import SamplingParams
from astrai_serve.engine.executor import Row, adjustments_of, filters_of
from astrai_serve.engine.sampling import counter_uniform, draw
from astrai_serve.engine.task import Task

VOCAB = 700  # more than the candidates looked at first
GRID = 5_000
FILTERS = [
    {},
    {"temperature": 0.4},
    {"temperature": 2.5},
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": 400},
    {"top_p": 0.001},
    {"top_p": 0.6},
    {"top_p": 0.99, "temperature": 3.0},
    {"min_p": 0.2},
    {"top_k": 50, "top_p": 0.8},
    {"top_k": 500, "top_p": 0.9, "min_p": 0.02, "temperature": 1.7},
]


def transformers() -> Any:
    """Imported late, for it is slow; untyped, for its annotations want subclasses of tensors."""
    return importlib.import_module("transformers")


def task(prompt=(1, 2), output=(), stop_ids=(), **params):
    params = SamplingParams(**params)
    made = Task(
        task_id=0,
        prompt_ids=prompt,
        params=params,
        max_tokens=99,
        seed=0,
        stop_ids=frozenset(stop_ids),
    )
    made.token_ids += output
    return made


def logits(rows=1):
    generator = torch.Generator().manual_seed(7)
    return torch.randn(rows, VOCAB, generator=generator) * 2


def processed(scores, filters):
    """The distribution by transformers."""
    hf = transformers()

    ids = torch.zeros(1, 1, dtype=torch.long)
    processors = [hf.TemperatureLogitsWarper(float(filters.get("temperature", 1.0)))]
    if "top_k" in filters:
        processors.append(hf.TopKLogitsWarper(filters["top_k"]))
    if "top_p" in filters:
        processors.append(hf.TopPLogitsWarper(filters["top_p"]))
    if "min_p" in filters:
        processors.append(hf.MinPLogitsWarper(filters["min_p"]))
    for processor in processors:
        scores = processor(ids, scores)
    return scores.double().softmax(1)[0]


@pytest.mark.parity
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_draws_follow_the_reference_distribution(filters):
    scores, wanted = logits(), processed(logits(), filters)
    uniform = (torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID
    counts = torch.zeros(VOCAB, dtype=torch.double)
    for part in uniform.split(2000):
        columns = filters_of([task(**filters)] * len(part), VOCAB, scores.device)
        drawn = draw(scores.expand(len(part), -1), columns, part)
        counts += torch.bincount(drawn, minlength=VOCAB)
    assert (counts - wanted * GRID).abs().max() < 1.1
    assert not counts[wanted == 0].any()


def test_rows_of_a_batch_draw_as_alone():
    scores, uniform = logits(len(FILTERS)), torch.rand(len(FILTERS), dtype=torch.float64)
    tasks = [task(**filters) for filters in FILTERS]
    together = draw(scores, filters_of(tasks, VOCAB, scores.device), uniform)
    for n, one in enumerate(tasks):
        alone = draw(scores[n : n + 1], filters_of([one], VOCAB, scores.device), uniform[n : n + 1])
        assert together[n] == alone


@pytest.mark.parametrize("edge", [0.0, 1 - 2.0**-53])
def test_the_ends_of_the_scale_draw_a_possible_token(edge):
    scores = torch.full((1, VOCAB), -math.inf)
    scores[0, [3, 500]] = 0.0
    for filters in FILTERS:
        columns = filters_of([task(**filters)], VOCAB, scores.device)
        assert draw(scores, columns, torch.tensor([edge], dtype=torch.float64)) in (3, 500)


def adjusted(scores, *tasks):
    adjustments = adjustments_of([Row(task) for task in tasks])
    return scores if adjustments is None else adjustments.apply(scores)


@pytest.mark.parity
@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_repetition_penalty_is_that_of_transformers(penalty):
    hf = transformers()

    one = task(prompt=(5, 6, 6), output=(9, 5), repetition_penalty=penalty)
    wanted = hf.RepetitionPenaltyLogitsProcessor(penalty)(
        torch.tensor([one.token_ids]), logits().clone()
    )
    torch.testing.assert_close(adjusted(logits(), one), torch.as_tensor(wanted))


@pytest.mark.parity
def test_bias_and_min_tokens_are_those_of_transformers():
    hf = transformers()

    one = task(output=(7,), min_tokens=2, stop_ids=(4, 11), logit_bias=((3, 2.5), (8, -100.0)))
    ids = torch.tensor([one.token_ids])
    wanted = hf.SequenceBiasLogitsProcessor({(3,): 2.5, (8,): -100.0})(ids, logits())
    shortest = hf.MinNewTokensLengthLogitsProcessor(2, 2, [4, 11], device="cpu")
    torch.testing.assert_close(adjusted(logits(), one), torch.as_tensor(shortest(ids, wanted)))
    one.token_ids.append(7)
    assert adjusted(logits(), one)[0, 4] == logits()[0, 4]


def test_presence_and_frequency_count_the_output_alone():
    one = task(prompt=(5, 6), output=(6, 9, 9), presence_penalty=0.5, frequency_penalty=0.25)
    wanted = logits()
    wanted[0, 6] -= 0.5 + 0.25
    wanted[0, 9] -= 0.5 + 2 * 0.25
    torch.testing.assert_close(adjusted(logits(), one), wanted)


def by_hand(scores, task):
    """The whole pipeline in NumPy, one token after the other: probabilities of one row."""
    p = task.params
    row = scores.double().numpy().copy()
    output = task.token_ids[task.num_prompt_tokens :]
    for token_id in set(task.token_ids):
        factor = p.repetition_penalty
        row[token_id] = row[token_id] / factor if row[token_id] > 0 else row[token_id] * factor
    for token_id in set(output):
        row[token_id] -= p.presence_penalty + p.frequency_penalty * output.count(token_id)
    for token_id, bias in p.logit_bias:
        row[token_id] += bias
    if len(output) < p.min_tokens:
        row[list(task.stop_ids)] = -np.inf
    row = row / p.temperature
    best_first = np.argsort(-row, kind="stable")
    chances = np.zeros_like(row)
    kept = best_first[: p.top_k or len(row)]
    chances[kept] = np.exp(row[kept] - row.max())
    chances /= chances.sum()
    total = 0.0
    for token_id in best_first:
        chances[token_id] *= total < p.top_p
        total += chances[token_id]
    chances[chances < p.min_p * chances.max()] = 0
    return torch.from_numpy(chances / chances.sum())


ALL = {
    "repetition_penalty": 1.4, "presence_penalty": 0.7, "frequency_penalty": 0.3,
    "logit_bias": ((3, 2.5), (6, 4.0), (9, -1.0)), "temperature": 1.3, "top_k": 25,
    "top_p": 0.97, "min_p": 0.12, "min_tokens": 9,
}  # fmt: skip


def drawn_counts(scores, one):
    """How often the engine draws each token on a fine grid of uniform numbers."""
    uniform = (torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID
    rows = adjusted(scores[None], one).expand(GRID, -1)
    drawn = draw(rows, filters_of([one] * GRID, scores.shape[0], scores.device), uniform)
    return torch.bincount(drawn, minlength=scores.shape[0])


@pytest.mark.parametrize("without", [None, *ALL])
def test_all_parameters_together_in_their_order_and_with_each_left_out(without):
    scores = logits()[0, :120] * 1.5
    used = {name: value for name, value in ALL.items() if name != without}
    prompt, output = (5, 6, 6, 40), (6, 9, 9, 9, 77)
    likely = tuple(scores.topk(2).indices.tolist())  # or forbidding them would show nothing
    one = task(prompt=prompt, output=output, stop_ids=likely, **used)
    wanted = by_hand(scores, one)
    counts = drawn_counts(scores, one)
    assert (counts - wanted * GRID).abs().max() < 1.1


@pytest.mark.parametrize(
    ("chances", "filters", "num_kept"),
    [
        ([4, 4, 4, 4], {"top_k": 2}, 2),
        ([4, 4, 4, 4], {"top_p": 0.49}, 2),
        ([4, 4, 4, 4], {"top_p": 0.51}, 3),
        ([8, 4, 2, 2], {"top_p": 0.74}, 2),
        ([8, 4, 2, 2], {"top_p": 0.76}, 3),
        ([8, 4, 2, 2], {"top_p": 0.0001}, 1),
        ([8, 4, 2, 2], {"top_k": 3, "top_p": 0.8}, 2),  # of 14 parts: 8, 12
        ([8, 4, 2, 2], {"min_p": 0.49}, 2),
        ([8, 4, 2, 2], {"min_p": 0.51}, 1),
        ([8, 4, 2, 2], {"min_p": 0.24}, 4),
    ],
    ids=str,
)
def test_ties_and_edges_of_the_filters(chances, filters, num_kept):
    counts = drawn_counts(torch.tensor(chances).double().div(16).log().float(), task(**filters))
    assert int((counts > 0).sum()) == num_kept
    kept = torch.tensor(sorted(chances, reverse=True)[:num_kept]).double()
    wanted = kept / kept.sum() * GRID
    assert (counts.sort(descending=True).values[:num_kept] - wanted).abs().max() < 1.1


def test_adjustments_stay_in_their_rows():
    one, plain = task(logit_bias=((3, 5.0),), repetition_penalty=2.0), task()
    rows = adjusted(logits(3), plain, one, plain)
    assert torch.equal(rows[[0, 2]], logits(3)[[0, 2]])
    torch.testing.assert_close(rows[1:2], adjusted(logits(3)[1:2], one))


def test_the_counter_is_uniform_in_each_of_its_arguments():
    for name in ("seed", "sample_index", "position"):
        fixed = {"seed": 1, "sample_index": 2, "position": 3}
        numbers = torch.tensor(
            [counter_uniform(**fixed | {name: n}) for n in range(8000)], dtype=torch.float64
        )
        counts = torch.histc(numbers, bins=20, min=0, max=1)
        chi_square = ((counts - 400) ** 2 / 400).sum()
        assert chi_square < 43.8, name  # of 19 degrees of freedom, exceeded once in a thousand
        following = torch.corrcoef(torch.stack((numbers[:-1], numbers[1:])))[0, 1]
        assert abs(following) < 0.04, name


def test_the_counter_is_the_same_for_the_same_arguments():
    assert counter_uniform(1, 2, 3) == counter_uniform(1, 2, 3)
    assert len({counter_uniform(*key) for key in [(1, 11, 1), (11, 1, 1), (1, 1, 11)]}) == 3
