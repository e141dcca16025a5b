"""Tokens of thoughts are counted one by one, however few events a slow reader gets."""

from functools import reduce
from itertools import pairwise
from operator import add

import pytest

from astrai_core.generation import FinishReason, SamplingParams
from astrai_core.tokenizer.message_parsing import MessageFormat, Where
from astrai_serve.api.conversation import Reading
from astrai_serve.api.generation_request import GenerationRequest
from astrai_serve.api.protocol import StreamContext
from astrai_serve.engine.detokenizer import Detokenizer
from astrai_serve.engine.task import Finish, TaskEvent

FORMAT = MessageFormat(thoughts=("<think>", "</think>"))
# a token of half a character has no text of its own
PIECES = [
    b"\n",
    b"<th",
    b"ink>",
    b"\nI ",
    b"am ",
    b"\xe5\x8c",
    b"\x97",
    b"</think",
    b">\n",
    b"Yes",
    b".",
]


def events(pieces: list[bytes]) -> list[TaskEvent]:
    """What the engine tells of these tokens, one by one."""
    detokenizer = Detokenizer(pieces.__getitem__)
    told: list[TaskEvent] = []
    for n in range(len(pieces)):
        text = detokenizer.feed(n, True)
        told.append(TaskEvent(text=text, token_ids=(n,), text_ends=(len(text),)))
    finish = Finish(
        reason=FinishReason.LENGTH,
        num_prompt_tokens=1,
        num_cached_tokens=0,
        num_output_tokens=len(pieces),
    )
    told[-1] += TaskEvent(text=detokenizer.finish(cut_off=True), finish=finish)
    return told


def counted(told: list[TaskEvent], where: Where) -> int:
    reading = Reading(format=FORMAT, where=where)
    request = GenerationRequest(prompts=((1,),), params=SamplingParams(), reading=reading)
    context = StreamContext(request=request, response_id="r", model="m")
    for event in told:
        context.add(0, event)
    return context.choices[0].num_thought_tokens


@pytest.mark.parametrize(
    ("where", "pieces", "thoughts"),
    [
        # the opener's last token, I, am, 北 in halves, and a closer that is not whole yet
        ("start", PIECES, 6),
        ("thoughts", PIECES[3:], 5),
        ("thoughts", PIECES[3:7], 4),
        ("content", PIECES, 0),
        ("start", PIECES[3:], 0),
    ],
)
def test_merged_events_count_as_single_ones_do(where, pieces, thoughts):
    single = events(pieces)
    assert counted(single, where) == thoughts
    for size in range(2, len(single) + 1):
        for start in range(size):
            cuts = [0, *range(start, len(single), size), len(single)]
            merged = [reduce(add, single[a:b]) for a, b in pairwise(cuts) if a < b]
            assert counted(merged, where) == thoughts, (size, start)
