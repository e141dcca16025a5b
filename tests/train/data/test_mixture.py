from collections import Counter

import pytest

from astrai_train.data.mixture import Mixture


def test_each_source_has_its_share_and_the_largest_is_seen_once():
    mixture = Mixture([range(100), range(1000, 1010)], [0.75, 0.25])
    rows = Counter(mixture[index] for index in range(len(mixture)))
    assert mixture.counts == [100, 33]
    assert all(rows[row] == 1 for row in range(100))
    assert {rows[row] for row in range(1000, 1010)} == {3, 4}
    assert mixture.locate(100) == (1, 0)
    assert mixture.locate(132) == (1, 2)


def test_the_unit_of_the_weights_does_not_matter():
    sources = [range(7), range(50), range(20)]
    assert Mixture(sources, [1, 2, 3]).counts == Mixture(sources, [10, 20, 30]).counts
    equal = Mixture(sources, [7, 50, 20])
    assert [equal[index] for index in range(len(equal))] == [*range(7), *range(50), *range(20)]


def test_a_wrong_weight_is_refused():
    with pytest.raises(ValueError, match="weights has 1 numbers for 2 sources"):
        Mixture([range(3), range(4)], [1.0])
    with pytest.raises(ValueError, match="weights must be above 0, not 0"):
        Mixture([range(3), range(4)], [1.0, 0])
    with pytest.raises(IndexError, match="row 7 of 7"):
        Mixture([range(3), range(4)], [3, 4])[7]
