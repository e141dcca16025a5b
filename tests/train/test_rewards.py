"""Rewards as a trainer asks for them, and the ones that come with the project."""

import importlib.util
import math

import pytest
import torch

from astrai_train.data.curriculum import generate
from astrai_train.data.reasoning import reasoning_records
from astrai_train.rewards import (
    Matches,
    ShortEnough,
    checked_answer,
    final_answer,
    has_conclusion,
    judge,
    reasoning_gym_score,
    reward_names,
    weighted_sum,
)

RECORDS = [{"prompt": "a?", "answer": "1"}, {"prompt": "b?", "answer": "2"}]


def message(text):
    return [{"role": "assistant", "content": text}]


def test_a_function_gets_what_it_names():
    """The order of arguments and of columns does not matter."""
    asked = {}

    def everything(completions, **columns):
        asked.update(columns, completions=completions)
        return [0.0, 1.0]

    def only_one(answer, completions):
        return [float(a == c) for a, c in zip(answer, completions, strict=True)]

    scores = judge([everything, only_one], ["1", "3"], [[5], [6, 7]], RECORDS)
    assert scores.tolist() == [[0, 1], [1, 0]]
    assert asked == {
        "completions": ["1", "3"],
        "completion_ids": [[5], [6, 7]],
        "prompts": ["a?", "b?"],
        "answer": ["1", "2"],
    }


def test_none_cannot_judge_and_only_that():
    scores = judge(
        [lambda completions: [None, 2.0], lambda completions: [None, None]],
        ["x", "y"],
        [[], []],
        [{}, {}],
    )
    total = weighted_sum(scores, [0.5, 10.0])
    assert math.isnan(total[0])
    assert total[1] == 1.0


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda completions: [1.0], "returned 1 for 2 completions"),
        (lambda completions: 1.0, "returned float for 2 completions"),
        (lambda completions: [1.0, "x"], "'x', which is neither"),
        (lambda completions: [1.0, math.inf], "inf, which is neither"),
        (
            lambda completions, solution: [1.0, 1.0],
            "asks for solution, but the records have answer",
        ),
    ],
)
def test_a_bad_function_is_named_with_what_it_did(function, message):
    function.__name__ = "mine"
    with pytest.raises(ValueError, match=rf"reward function mine .*{message}"):
        judge([function], ["x", "y"], [[], []], RECORDS)


def test_names_tell_functions_apart():
    assert reward_names([has_conclusion, ShortEnough(4, 2), has_conclusion]) == [
        "has_conclusion",
        "ShortEnough",
        "has_conclusion_2",
    ]


@pytest.mark.parametrize("task", ["arithmetic_english", "arithmetic_chinese", "asked_language"])
def test_the_curriculum_judges_its_own_answers(task):
    items = generate(task, "train", 3, seed=5)
    said = [message(item.reply) for item in items]
    wrong = [message(item.reply + " 7") for item in items]
    checkers = [item.checker for item in items]
    assert checked_answer(said, checkers) == [1, 1, 1]
    assert checked_answer(wrong, checkers) == [0, 0, 0]


def test_a_final_answer_may_stand_alone_or_conclude():
    said = ["3+4=7\nThe answer is 7.", "３＋４＝７\n答案是７。", "7", "7 or 8", "The answer is 8."]
    assert final_answer(said, ["7"] * 5) == [1, 1, 1, 0, 0]
    assert has_conclusion(said) == [1, 1, 0, 0, 1]


def test_length_costs_only_near_its_end():
    rewards = ShortEnough(max_tokens=10, margin=4)([[0] * n for n in (0, 6, 7, 10, 99)])
    assert rewards == [0, 0, -0.25, -1, -1]
    with pytest.raises(ValueError, match="margin of ShortEnough must be from 1 to max_tokens 3"):
        ShortEnough(3, 4)


def test_a_pattern_judges_the_form():
    reward = Matches(r"<think>.*</think>.+")
    assert reward(["<think>so\n</think>yes", "yes", message("<think></think>")]) == [1, 0, 0]
    with pytest.raises(ValueError, match=r"pattern '\(' of Matches"):
        Matches("(")


@pytest.mark.skipif(not importlib.util.find_spec("reasoning_gym"), reason="an extra")
@pytest.mark.filterwarnings("ignore")
def test_reasoning_tasks_are_prompts_that_their_own_scorer_judges():
    records = list(reasoning_records(["leg_counting", "chain_sum"], 4, seed=3))
    assert [one["entry"]["metadata"]["source_dataset"] for one in records] == [
        "leg_counting",
        "chain_sum",
    ] * 2
    said = [message(f"hm <answer>{one['answer']}</answer>") for one in records]
    scores = judge([reasoning_gym_score], [*said, said[0]], [[]] * 5, [*records, records[1]])
    assert torch.equal(scores[:4, 0], torch.ones(4, dtype=torch.float64))
    assert scores[4, 0] < 1
    assert reasoning_gym_score(["no tag"], [records[0]["entry"]]) == [0]
    with pytest.raises(ValueError, match=r"no task nonsense; it has .*leg_counting"):
        list(reasoning_records(["nonsense"], 1))
