from collections import Counter

import pytest

from astrai_train.data.datasets import NumberedDataset
from astrai_train.data.mixture import Mixture


class Numbers(NumberedDataset):
    def __init__(self, *bounds):
        self.numbers = range(*bounds)

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, number):
        return -1 if number is None else self.numbers[number]

    def place(self, number):
        return f"number {number}"

    def collate(self, items):
        return {"items": items}


def test_each_source_has_its_share_and_the_largest_is_seen_once():
    mixture = Mixture([Numbers(100), Numbers(1000, 1010)], [0.75, 0.25])
    rows = Counter(mixture[index] for index in range(len(mixture)))
    assert mixture.counts == [100, 33]
    assert all(rows[row] == 1 for row in range(100))
    assert {rows[row] for row in range(1000, 1010)} == {3, 4}
    assert mixture.locate(100) == (1, 0)
    assert mixture.locate(132) == (1, 2)
    assert mixture[None] == -1
    assert mixture.collate([3]) == {"items": [3]}


def test_the_unit_of_the_weights_does_not_matter():
    sources = [Numbers(7), Numbers(50), Numbers(20)]
    assert Mixture(sources, [1, 2, 3]).counts == Mixture(sources, [10, 20, 30]).counts
    equal = Mixture(sources, [7, 50, 20])
    assert [equal[index] for index in range(len(equal))] == [*range(7), *range(50), *range(20)]


def test_a_wrong_weight_is_refused():
    with pytest.raises(ValueError, match="weights has 1 numbers for 2 sources"):
        Mixture([Numbers(3), Numbers(4)], [1.0])
    with pytest.raises(ValueError, match="weights must be above 0, not 0"):
        Mixture([Numbers(3), Numbers(4)], [1.0, 0])
    with pytest.raises(IndexError, match="item 7 of 7"):
        Mixture([Numbers(3), Numbers(4)], [3, 4])[7]
