import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from astrai_train.data.ragged import Ragged

SEQUENCES = st.lists(st.lists(st.integers(0, 60000), max_size=5), max_size=6)


@given(st.lists(SEQUENCES, min_size=1, max_size=4), st.data())
def test_joined_parts_read_as_one_list(parts, data):
    ragged = Ragged.join([Ragged.of(part, np.uint16) for part in parts])
    plain = [sequence for part in parts for sequence in part]
    flat = [value for sequence in plain for value in sequence]
    assert [ragged[n].tolist() for n in range(len(ragged))] == plain
    assert ragged.lengths.tolist() == [len(sequence) for sequence in plain]
    start = data.draw(st.integers(0, len(flat)))
    stop = data.draw(st.integers(start, len(flat)))
    assert ragged.flat(start, stop).tolist() == flat[start:stop]


@pytest.mark.parametrize("offsets", [[0, 2], [1, 3], [0, 4, 3], [], [0, 4]])
def test_offsets_that_miss_values_are_refused(offsets):
    with pytest.raises(ValueError, match="offsets"):
        Ragged([np.zeros(3, np.uint16)], np.array(offsets, np.int64))
