import re
from xml.etree import ElementTree

import pytest

from astrai_train.report.chart import line_chart, number, ticks


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 5, [0, 1, 2, 3, 4, 5]),
        (0.2, 5.3, [0, 2, 4, 6]),
        (-1, 1, [-1, -0.5, 0, 0.5, 1]),
        (0, 2700, [0, 1000, 2000, 3000]),
        (3, 3, [1, 2, 3, 4, 5]),
        (0, 0, [-0.6, -0.4, -0.2, 0, 0.2, 0.4, 0.6]),
    ],
)
def test_ticks_are_round_and_span_the_range(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.0474, "0.0474"),
        (2.5, "2.5"),
        (12345.6, "12,346"),
        (2e-5, "2e-05"),
        (1e9, "1e+09"),
    ],
)
def test_numbers_are_short(value, text):
    assert number(value) == text


def test_the_drawing_is_xml_whose_points_go_the_right_way():
    svg = line_chart({"train/<loss>": [(0, 4.0), (50, 2.0), (100, 0.0)], "val/loss": [(100, 1.0)]})
    root = ElementTree.fromstring(svg)
    lines = [element for element in root if element.tag == "polyline"]
    points = [tuple(map(float, pair.split(","))) for pair in lines[0].get("points", "").split()]
    xs, ys = zip(*points, strict=True)
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1])
    assert ys[0] < ys[1] < ys[2]  # downwards on a screen
    assert len(lines) == 2
    titles = [title.text for title in root.iter("title")]
    assert titles[:1] == ["train/<loss> 4 at step 0"]
    assert titles[-1] == "val/loss 1 at step 100"


def test_a_line_without_a_finite_value_is_not_drawn():
    assert line_chart({"loss": [(1, float("nan"))], "other": []}) == ""
    assert len(re.findall("<polyline", line_chart({"a": [(1, float("inf")), (2, 1.0)]}))) == 1
