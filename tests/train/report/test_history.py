import pytest

from astrai_train.report import History
from astrai_train.report.history import Sample, read_samples, thinned


def test_a_run_is_read_with_half_a_line_at_its_end(tmp_path):
    (tmp_path / "metrics.csv").write_text(
        "epoch,step,train/loss,val/loss\n0,9,2.5,\n0,9,,2.75\n0,19,1.5,\n0,"
    )
    (tmp_path / "config.yaml").write_text("model: {class_path: SEQModule}\n")
    history = History.of(tmp_path)
    assert history.series == {"train/loss": [(10, 2.5), (20, 1.5)], "val/loss": [(10, 2.75)]}
    assert history.config == {"model": {"class_path": "SEQModule"}}
    assert (history.last_step, history.samples) == (20, [])


def test_a_folder_without_anything_is_a_run_that_has_not_begun(tmp_path):
    assert History.of(tmp_path) == History(folder=tmp_path)
    assert History.of(tmp_path).last_step == 0


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,loss\n3,fast\n")
    with pytest.raises(ValueError, match=r"metrics.csv holds 'fast' where a number"):
        History.of(tmp_path)
    samples = tmp_path / "samples.jsonl"
    good = '{"step": 1, "prompt": "p", "text": "t"}\n'
    samples.write_text(good + '{"st')
    assert read_samples(samples) == [Sample(step=1, prompt="p", text="t")]
    samples.write_text('{"st\n' + good)
    with pytest.raises(ValueError, match=r"samples.jsonl line 1 is not a sample"):
        read_samples(samples)


def test_a_long_line_keeps_its_shape_and_its_end():
    points = [(float(step), float(step % 10)) for step in range(1, 1001)]
    short = thinned(points, 100)
    assert len(short) == 100
    assert short[-1] == (1000, 4.5)  # 991 to 1,000: the mean of 1 to 9 and 0
    assert thinned([(1, 1.0), (2, float("nan"))], 5) == [(1, 1.0)]
