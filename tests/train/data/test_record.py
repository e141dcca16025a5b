from pathlib import Path

import pytest

from astrai_train.data.record import Record

ASK = {"role": "user", "content": "2+2?"}
FOUR = {"role": "assistant", "content": "4"}
FIVE = {"role": "assistant", "content": "5"}


def record(**content) -> Record:
    return Record(file=Path("some.jsonl"), line=3, content=content, size=0)


@pytest.mark.parametrize(
    "content",
    [
        {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
        {"prompt": [ASK], "chosen": [FOUR], "rejected": "5"},
        {"prompt": "2+2?", "chosen": [ASK, FOUR], "rejected": [ASK, FIVE]},
        {"chosen": [ASK, FOUR], "rejected": [ASK, FIVE]},
    ],
)
def test_a_pair_may_be_written_in_several_ways(content):
    pair = record(**content).pair()
    assert (pair.prompt, pair.chosen, pair.rejected) == ([ASK], [FOUR], [FIVE])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, "line 3: stage dpo wants .*found chosen, prompt"),
        ({"text": "a"}, "stage dpo wants .*; this looks like stage seq"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are the same"),
        ({"prompt": "a", "chosen": " ", "rejected": "b"}, "line 3: the chosen is empty"),
        ({"prompt": "a", "chosen": 4, "rejected": "b"}, "chosen must be text or a list"),
        ({"chosen": "b", "rejected": "c"}, "there is no prompt, and chosen and rejected do not"),
        ({"prompt": [{"content": "a"}], "chosen": "b", "rejected": "c"}, "of the prompt must be"),
    ],
)
def test_a_bad_pair_is_refused_by_its_line(content, message):
    with pytest.raises(ValueError, match=message):
        record(**content).pair()


def test_a_question_tells_reward_functions_all_but_its_responses():
    question = record(prompt="2+2?", responses=["4", [FIVE]], rewards=[1, 0.5], answer=4).question()
    assert question.prompt == [ASK]
    assert question.responses == [[FOUR], [FIVE]]
    assert question.columns == {"prompt": "2+2?", "rewards": [1, 0.5], "answer": 4}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"answer": 4}, "line 3: stage grpo wants .*found answer"),
        ({"prompt": [ASK, FOUR]}, "the prompt ends with an answer"),
        ({"prompt": "a", "rewards": [1, 2]}, "responses must be a list"),
        ({"prompt": "a", "responses": ["b", "c"], "rewards": [1]}, "2 responses and 1 rewards"),
        ({"prompt": "a", "responses": ["b"], "rewards": [1]}, "there must be at least two"),
        (
            {"prompt": "a", "responses": ["b", "c"], "rewards": [1, float("nan")]},
            "reward 2 must be a number, not nan",
        ),
        ({"prompt": "a", "responses": ["b", ""], "rewards": [1, 2]}, "response 2 is empty"),
    ],
)
def test_a_bad_question_is_refused_by_its_line(content, message):
    with pytest.raises(ValueError, match=message):
        record(**content).question()


@pytest.mark.parametrize(
    ("keys", "stage"),
    [
        (("prompt", "chosen", "rejected"), "dpo"),
        (("prompt", "completion"), "sft"),
        (("messages", "tools"), "sft"),
        (("prompt", "answer"), "grpo"),
        (("text",), "seq"),
        (("a",), None),
    ],
)
def test_the_stage_is_seen_by_the_keys(keys, stage):
    assert record(**dict.fromkeys(keys, "b")).stage == stage
