import pytest

from astrai_train.callbacks.layout import Layout


def test_a_step_may_have_its_rows_from_any_number_of_ranks():
    one = Layout(devices=1, accumulate=8, batch_size=2, repeats=1)
    for devices, accumulate, batch_size in ((2, 4, 2), (4, 1, 4), (1, 16, 1)):
        Layout(
            devices=devices, accumulate=accumulate, batch_size=batch_size, repeats=1
        ).refuse_other_rows(one)


def test_rollouts_count_by_their_prompts():
    """Four pieces of a rollout, twice, are eight batches of the same prompts."""
    two = Layout(devices=2, accumulate=4, batch_size=3, repeats=8)
    assert two.rows == 3
    Layout(devices=1, accumulate=2, batch_size=6, repeats=4).refuse_other_rows(two)


def test_other_rows_are_refused_with_all_factors():
    one = Layout(devices=1, accumulate=1, batch_size=4, repeats=1)
    two = Layout(devices=2, accumulate=1, batch_size=4, repeats=1)
    with pytest.raises(ValueError, match=r"had 4 rows .*devices 1\), .* 8 .*devices 2\)"):
        two.refuse_other_rows(one)


def test_a_checkpoint_without_a_layout_is_refused():
    with pytest.raises(ValueError, match="earlier version"):
        Layout.saved(None)
