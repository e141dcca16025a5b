"""What is streamed is the text, however the tokens cut it."""

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from astrai_serve.engine.detokenizer import Detokenizer, StopMatcher

CORPUS = "你好，世界！北京 2026 𠮷野家 😀👩‍👩‍👧‍👦 naïve ñ\u200b é🏳️‍🌈。"


def stream(pieces, stop=(), may_stop=None):
    """Feed pieces of bytes as tokens; return the streamed parts and the detokenizer."""
    detokenizer = Detokenizer(pieces.__getitem__, stop)
    parts = []
    for token_id in range(len(pieces)):
        parts.append(detokenizer.feed(token_id, may_stop is None or may_stop[token_id]))
        if detokenizer.stop is not None:
            break
    return parts, detokenizer


def cut(content, places):
    edges = sorted({0, len(content), *(place % (len(content) + 1) for place in places)})
    return [content[a:b] for a, b in pairwise(edges)]


places = st.lists(st.integers(0, 10_000), max_size=60)


def test_each_byte_a_token():
    content = CORPUS.encode()
    parts, detokenizer = stream([content[n : n + 1] for n in range(len(content))])
    assert "".join(parts) + detokenizer.finish() == CORPUS
    assert all("\ufffd" not in part for part in parts)


def test_every_prefix_shows_whole_characters_only():
    content = CORPUS.encode()
    for end in range(len(content) + 1):
        parts, detokenizer = stream([content[:end], content[end:]])
        shown = parts[0]
        assert CORPUS.startswith(shown)
        assert len(content[:end]) - len(shown.encode()) < 4
        assert "".join(parts) + detokenizer.finish() == CORPUS


def test_half_a_character_is_left_out_when_cut_off_and_an_error_when_it_ends_so():
    half = ["好".encode()[:2]]
    for cut_off, text in ((True, ""), (False, "\ufffd")):
        parts, detokenizer = stream(half)
        assert "".join(parts) + detokenizer.finish(cut_off) == text


@given(content=st.text().map(str.encode) | st.binary(), where=places)
def test_any_bytes_under_any_cut(content, where):
    parts, detokenizer = stream(cut(content, where))
    assert "".join(parts) + detokenizer.finish() == content.decode("utf-8", "replace")


words = st.text(alphabet="ab好", min_size=1, max_size=4)


@settings(max_examples=300)
@given(text=st.text(alphabet="ab好", max_size=24), stop=words, where=places)
def test_one_stop_string_cuts_as_split_does(text, stop, where):
    parts, detokenizer = stream(cut(text.encode(), where), (stop,))
    assert "".join(parts) + detokenizer.finish() == text.split(stop)[0]
    assert (detokenizer.stop == stop) == (stop in text)


@settings(max_examples=300)
@given(text=st.text(alphabet="ab好", max_size=24), stops=st.lists(words, max_size=4), where=places)
def test_of_several_the_first_to_be_complete(text, stops, where):
    """Told character by character, which no cut may change."""
    wanted, met = text, None
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            met = max(ending, key=len)
            wanted = text[:end].removesuffix(met)
            break
    parts, detokenizer = stream(cut(text.encode(), where), tuple(stops))
    assert "".join(parts) + detokenizer.finish() == wanted
    assert detokenizer.stop == met


@given(text=st.text(alphabet="ab好", max_size=24), stops=st.lists(words, min_size=1, max_size=4))
def test_no_more_is_held_back_than_could_become_a_stop_string(text, stops):
    matcher, shown = StopMatcher(stops), ""
    for n, character in enumerate(text, 1):
        shown += matcher.feed(character)
        if matcher.matched is not None:
            return
        held = text[len(shown) : n]
        assert shown + held == text[:n]
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)


def test_a_stop_string_may_begin_where_none_may_end_yet():
    pieces = [b"x", b"a", b"b", b"y"]
    parts, detokenizer = stream(pieces, ("ab",), may_stop=[False, False, True, True])
    assert ("".join(parts), detokenizer.stop) == ("x", "ab")


def test_a_stop_string_that_ends_too_early_is_text():
    pieces = [b"ab", b"c", b"ab"]
    parts, detokenizer = stream(pieces, ("abc", "ab"), may_stop=[False, False, True])
    assert ("".join(parts), detokenizer.stop) == ("abc", "ab")
