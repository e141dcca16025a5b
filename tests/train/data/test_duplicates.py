import random

import numpy as np
import pytest

from astrai_train.data.duplicates import NGRAM, Digests, Seen, digest, signature, text_of


def grams(text: str) -> set[str]:
    return {text[start : start + NGRAM] for start in range(len(text) - NGRAM + 1)}


def words(generator: random.Random, count: int) -> list[str]:
    letters = "abcdefghij 的一是了我不人在他有"
    return ["".join(generator.choices(letters, k=6)) for _ in range(count)]


def test_signatures_agree_as_often_as_the_sets_of_ngrams_overlap():
    generator = random.Random(0)
    for changed in (0, 1, 3, 10, 40):
        first = words(generator, 120)
        second = list(first)
        for index in generator.sample(range(120), changed):
            second[index] = words(generator, 1)[0]
        one, other = " ".join(first), " ".join(second)
        overlap = len(grams(one) & grams(other)) / len(grams(one) | grams(other))
        estimate = float(np.mean(signature(one) == signature(other)))
        # the standard deviation of 128 draws is at most 0.044
        assert estimate == pytest.approx(overlap, abs=0.14)


def test_the_text_of_a_record_is_that_of_all_its_fields():
    chat = {"messages": [{"role": "user", "content": " a\n b "}], "n": 3, "none": None}
    assert text_of(chat) == "a b user 3"
    assert text_of({"text": "a b"}) == text_of({"text": "a\t b "})


def test_the_first_of_the_same_stays():
    seen = Seen("exact")
    marks = [(digest(text), None) for text in ("one", "two", "one", "three", "two")]
    assert seen.add(marks[:4]).tolist() == [True, True, False, True]
    assert seen.add(marks).tolist() == [False] * 5


def test_digests_are_a_set_of_16_bytes_each():
    generator = random.Random(3)
    # few first and last bytes, zeros among them, so that many are alike in parts
    alike = [bytes([a, b]) for a in range(4) for b in range(3)]
    drawn = [generator.choice(alike) + bytes(12) + generator.choice(alike) for _ in range(200)] + [
        generator.randbytes(16) for _ in range(3000)
    ]
    generator.shuffle(drawn)
    drawn += drawn[::3]
    digests, known, place = Digests(), set[bytes](), 0
    while place < len(drawn):
        some = drawn[place : place + generator.randrange(1, 300)]
        place += len(some)
        wanted = []
        for one in some:
            wanted.append(one not in known)
            known.add(one)
        assert digests.add(some).tolist() == wanted
    runs = digests._runs
    assert sum(run.nbytes for run in runs) == 16 * len(known)
    assert len(runs) < 12


def test_near_duplicates_go_and_others_stay():
    generator = random.Random(1)
    first = words(generator, 200)
    near = [*first[:100], "other!", *first[101:]]  # some 14 of 1,400 n-grams differ
    unlike = [*first[:80], *words(generator, 120)]
    seen = Seen("near")
    outcomes = []
    for chosen in (first, near, unlike, words(generator, 200)):
        text = " ".join(chosen)
        outcomes += seen.add([(digest(text), signature(text))]).tolist()
    assert outcomes == [True, False, True, True]
    short = seen.add([(digest(text), signature(text)) for text in ("hi", "ho", "HI", "")])
    assert short.tolist() == [True, True, False, True]  # each shorter than an n-gram
