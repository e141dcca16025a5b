"""How completions are asked for, and how they are laid out for training."""

import pytest
import torch

from astrai_core.generation import Completion, FinishReason, GenerationEngine, SamplingParams
from astrai_train.rollout import Rollout, RolloutConfig, sample_completions, sample_seed

PROMPTS = [[1, 2, 3], [1, 2, 3], [4], [4]]
ANSWERS = [[10, 11], [12], [13, 14, 15], [16, 17]]


def completion(ids) -> Completion:
    return Completion(
        token_ids=tuple(ids),
        logprobs=tuple(-float(i) for i in ids),
        finish_reason=FinishReason.STOP,
    )


def make(num_pieces=1) -> Rollout:
    return Rollout.of(
        [7, 9],
        PROMPTS,
        [completion(ids) for ids in ANSWERS],
        torch.tensor([1.0, -1, 0, 0]),
        torch.tensor([True, True, True, False]),
        num_pieces,
    )


class Recorder(GenerationEngine):
    """Remembers what it is asked for."""

    def __init__(self):
        self.calls = []

    def generate(self, prompts, params, between_steps=None):
        assert not isinstance(params, SamplingParams)
        self.calls.append((list(prompts), list(params)))
        return [completion([5])] * len(prompts)

    def update_weights(self):
        self.calls.append("update_weights")

    def stats(self):
        return {}

    def close(self):
        pass


def test_everything_is_asked_for_at_once_under_the_newest_weights():
    engine = Recorder()
    config = RolloutConfig(num_generations=2, max_completion=5, temperature=0.5)
    answers = sample_completions(
        engine, [[1], [2, 3]], [4, 8], config, step=3, stop_ids=frozenset({9, 8})
    )
    assert len(answers) == 4
    update, (prompts, params) = engine.calls
    assert update == "update_weights"
    assert prompts == [[1], [1], [2, 3], [2, 3]]
    assert {p.seed for p in params} == {sample_seed(0, 3, i, n) for i in (4, 8) for n in (0, 1)}
    assert {(p.max_tokens, p.temperature, p.stop_token_ids) for p in params} == {(5, 0.5, (8, 9))}


def test_a_seed_depends_on_each_of_its_parts_and_nothing_else():
    seeds = {
        sample_seed(run, step, prompt, sample)
        for run in (0, 1)
        for step in (0, 1)
        for prompt in (0, 11)
        for sample in (0, 1)
    }
    assert len(seeds) == 16
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert sample_seed(1, 2, 3, 4) == sample_seed(1, 2, 3, 4)
    assert sample_seed(0, 1, 11, 0) != sample_seed(0, 11, 1, 0)


def test_labels_are_the_completions_each_behind_its_own_prompt():
    rollout = make()
    piece = rollout.pack(torch.arange(4), padding_id=0)
    batch = piece.batch
    found = {}
    for row in range(len(batch["input_ids"])):
        for document in set(batch["document_ids"][row].tolist()) - {-1}:
            here = batch["document_ids"][row] == document
            ids, labels = batch["input_ids"][row][here], batch["labels"][row][here]
            assert batch["position_ids"][row][here].tolist() == list(range(len(ids)))
            found[tuple(ids.tolist())] = labels.tolist()
    assert found == {
        (1, 2, 3, 10, 11): [-100, -100, 10, 11, -100],
        (1, 2, 3, 12): [-100, -100, 12, -100],
        (4, 13, 14, 15): [13, 14, 15, -100],
        (4, 16, 17): [16, 17, -100],
    }


def test_a_label_knows_its_place_and_its_completion():
    """The engine's log-probability of token i was made -i."""
    rollout = make()
    piece = rollout.pack(torch.tensor([0, 2, 3]), padding_id=0)
    labels = piece.batch["labels"][piece.batch["labels"] != -100]
    assert rollout.sampled_logprobs[piece.places].tolist() == (-labels).tolist()
    owners = {0: {10, 11}, 2: {13, 14, 15}, 3: {16, 17}}
    for label, owner in zip(labels.tolist(), piece.completions.tolist(), strict=True):
        assert label in owners[owner]


def test_pieces_share_the_completions_out_and_balance_their_lengths():
    rollout = make(num_pieces=2)
    pieces = [rollout.numbers(0).tolist(), rollout.numbers(1).tolist()]
    assert sorted(pieces[0] + pieces[1]) == [0, 1, 2, 3]
    assert sorted(map(len, pieces)) == [2, 2]
    many = make(num_pieces=6)
    assert sorted(len(many.numbers(n)) for n in range(6)) == [0, 0, 1, 1, 1, 1]


def test_an_empty_piece_is_a_row_of_padding():
    piece = make().pack(torch.zeros(0, dtype=torch.int64), padding_id=3)
    assert set(piece.batch["input_ids"].flatten().tolist()) == {3}
    assert set(piece.batch["labels"].flatten().tolist()) == {-100}
    assert len(piece.places) == len(piece.completions) == 0


def test_a_saved_rollout_is_the_same():
    rollout = make(num_pieces=2)
    rollout.num_taken = 3
    rollout.old_logprobs[2] = -0.5
    again = Rollout.from_state(rollout.state_dict())
    torch.testing.assert_close(vars(again), vars(rollout), equal_nan=True)
    assert again.num_trained_tokens == 6
    assert not again.is_over(updates=2)
    assert again.is_of([7, 9])


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("num_generations", 1),
        ("max_completion", 0),
        ("temperature", 0),
        ("top_p", 0),
        ("top_k", -1),
        ("eval_temperature", -1),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(option, value):
    with pytest.raises(ValueError, match=rf"rollout\.{option} must"):
        RolloutConfig(**{option: value})
