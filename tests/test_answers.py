"""Answer checking, by a table of (completion, reference, verdict)."""

import threading

import pytest

from utils.answers import boxed, extract, is_correct, to_number

TABLE = [
    ("12+7=19\n#### 19", "12+7=19\n#### 19", True),
    ("12+7=18\n#### 18", "12+7=19\n#### 19", False),
    ("#### 1,234", "1234", True),
    ("#### $12.50", "12.5", True),
    ("#### 012", "12", True),
    ("#### 12.", "12", True),
    ("#### -3", "3", False),
    ("#### 12 apples", "12", True),
    ("#### 50%", "50", True),
    ("####", "0", False),
    ("#### ", "7", False),
    ("19", "19", True),
    ("It is 12, no, 19.", "19", True),
    ("It is 19, no, 12.", "19", False),
    ("The answer is 19. I checked it 3 times.", "19", True),
    ("The answer is: 1,000 dollars", "1000", True),
    (r"The answer is $\frac{3}{4}$.", "0.75", True),
    (r"The answer is $\frac{3}{4}$.", "3", False),
    ("The answer is 3x+2", "3", False),
    ("The answer is **12**.", "12", True),
    ("", "19", False),
    ("It is 19.", "", False),
    ("I do not know.", "19", False),
    (r"so \boxed{19}", "#### 19", True),
    (r"first \boxed{3}, then \boxed{4}", "4", True),
    (r"first \boxed{4}, then \boxed{3}", "4", False),
    (r"\boxed{\frac{1}{2}}", "0.5", True),
    (r"\boxed{\frac{1}{2}}", "1/2", True),
    (r"\boxed{\dfrac{3}{4}}", r"\boxed{\frac{3}{4}}", True),
    (r"\boxed{2\sqrt{2}}", r"\boxed{\sqrt{8}}", True),
    (r"\boxed{x^2+1}", r"\boxed{1+x^2}", True),
    (r"\boxed{x^2+1}", r"\boxed{x^2-1}", False),
    (r"\boxed{(1,2)}", r"\boxed{(1, 2)}", True),
    (r"\boxed{12 \text{ cm}}", "12", True),
    ("#### 1/3", "0.333", False),
    ("#### 1/0", "0", False),
]


@pytest.mark.parametrize("completion, answer, verdict", TABLE)
def test_table(completion, answer, verdict):
    assert is_correct(completion, answer) is verdict


def test_boxed_takes_nested_braces_and_survives_open_ones():
    assert boxed(r"a \boxed{\frac{1}{2}} b") == r"\frac{1}{2}"
    assert boxed(r"\boxed{1") is None and boxed("1") is None


def test_extract_order():
    assert extract(r"\boxed{1} #### 2") == "2"
    assert extract(r"the answer is 3, so \boxed{1}") == "1"
    assert extract("none") is None


def test_numbers():
    assert to_number("1,23") is None and to_number("x") is None and to_number(".5") * 2 == 1


def test_off_the_main_thread():
    verdicts = []
    thread = threading.Thread(
        target=lambda: verdicts.append(is_correct(r"\boxed{\frac{2}{4}}", r"\boxed{\frac{1}{2}}"))
    )
    thread.start()
    thread.join(30)
    assert verdicts == [True]
