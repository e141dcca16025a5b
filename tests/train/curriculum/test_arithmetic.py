import re

import pytest

from astrai_train.data.curriculum.arithmetic import add, divide, multiply, subtract


def test_working_as_at_school():
    assert add(37, 45).steps == ("7+5=12", "3+4+1=8")
    assert add(128, 95).steps == ("8+5=13", "2+9+1=12", "1+1=2")
    assert subtract(82, 45).steps == ("12-5=7", "8-1-4=3")
    assert multiply(37, 4).steps == ("7×4=28", "3×4=12", "12+2=14")
    assert divide(148, 4).steps == ("14=4×3+2", "28=4×7")


def _value(expression):
    return eval(expression.replace("×", "*"))


@pytest.mark.parametrize("operation", [add, subtract, multiply])
def test_every_step_is_true(operation):
    for a in range(13, 100):
        for b in range(1, 10):
            for step in operation(a, b).steps:
                left, _, right = step.partition("=")
                assert re.fullmatch(r"[\d+×-]+", left)
                assert _value(left) == int(right)


def test_every_step_of_a_division_is_true():
    for quotient in range(2, 100):
        for divisor in range(2, 10):
            for step in divide(quotient * divisor, divisor).steps:
                left, _, right = step.partition("=")
                assert int(left) == _value(right)


def test_order_does_not_matter_for_the_split_of_a_sum():
    assert add(37, 45).operands == add(45, 37).operands
    assert subtract(45, 37).operands != subtract(82, 37).operands
