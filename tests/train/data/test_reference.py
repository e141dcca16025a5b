import numpy as np
import pytest

from astrai_train.data.reference import ReferenceFile

KEY = {"weights": "aa", "data": "bb"}


def test_what_is_computed_is_found_again_and_the_rest_is_missing(tmp_path):
    file = ReferenceFile(tmp_path / "pairs.h5", KEY, 4)
    file.values[[1, 3]] = [[-1, -2], [-3, -4]]
    file.write()
    again = ReferenceFile(tmp_path / "pairs.h5", KEY, 4)
    np.testing.assert_array_equal(again.values, file.values)
    assert again.missing(np.arange(4)).tolist() == [0, 2]
    assert again.missing(np.array([3, 2])).tolist() == [2]
    assert [path.name for path in tmp_path.iterdir()] == [file.path.name]


def test_another_key_is_another_file_that_says_what_changed(tmp_path):
    file = ReferenceFile(tmp_path / "pairs.h5", KEY, 1)
    assert file.changes() == []
    file.write()
    other = ReferenceFile(tmp_path / "pairs.h5", KEY | {"data": "cc"}, 1)
    assert other.path != file.path
    assert other.changes() == ["data"]
    assert np.isnan(other.values).all()


def test_a_file_of_another_shape_is_damaged(tmp_path):
    file = ReferenceFile(tmp_path / "pairs.h5", KEY, 2)
    file.values = np.zeros((3, 2), dtype=np.float32)
    file.write()
    with pytest.raises(ValueError, match=r"is damaged \(its shape is \(3, 2\)\): delete it"):
        ReferenceFile(tmp_path / "pairs.h5", KEY, 2)
