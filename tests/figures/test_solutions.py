"""Judging written solutions: made-up ones whose truth is plain, the data sets' own, and pass@k by counting."""

import itertools
import json
import re
import threading

import pytest
from shared_data import SHARED, needs_shared

from beyondlora.figures.solutions import last_boxed, pass_at_k, right, strict

GSM8K = "She sold 48/2 = <<48/2=24>>24 clips in May.\n#### 72"
THOUSANDS = "It adds up.\n#### 1,080"
MATH = r"The value is thus $\boxed{\frac{1}{2}}$."


@pytest.mark.parametrize(
    ("text", "reference", "strictly", "mathematically"),
    [
        ("so 24 + 48 = 72\n#### 72", GSM8K, True, True),
        ("#### 72 clips\nQuestion: what else? #### 3", GSM8K, True, True),  # the first one counts
        ("24 and 48\n#### 71", GSM8K, False, False),
        ("The answer is 72.", GSM8K, False, True),
        ("72 of them; no, 73", GSM8K, False, False),
        ("", GSM8K, False, False),
        ("####", GSM8K, False, False),
        ("#### -72", GSM8K, False, False),
        ("#### 72.00", GSM8K, False, True),
        ("#### 1080", THOUSANDS, True, True),
        ("#### 1,080.", THOUSANDS, True, True),
        ("The answer is 1080.", THOUSANDS, False, True),
        ("The answer is 80.", THOUSANDS, False, False),
        ("#### 1", THOUSANDS, False, False),
        (r"Hence \boxed{ \frac{1}{2} }", MATH, True, True),
        (r"Hence \boxed{0.5}", MATH, False, True),
        (r"Hence \boxed{\dfrac12}", MATH, False, True),
        (r"First \boxed{\frac{1}{2}}, but then \boxed{2}", MATH, False, False),
        (r"Hence \boxed{\frac{1}{2}", MATH, False, None),  # never closed: what a library makes of it is its business
        ("one half, 1/2", MATH, False, True),
        (r"\boxed{\text{Evelyn}}", r"It is \boxed{\text{Evelyn}}.", True, True),
        ("8.0", "8.0", True, True),
        ("The answer is 8", "8.0", False, True),
        ("9**9**9**9**9", "8.0", False, False),
        # References of other data sets than the two: no answer is right because neither can be read.
        ("I have no idea.", "Because of that.\n#### Yes", False, False),
        ("#### No", "#### Yes", False, False),
        ("#### Yes.", "#### Yes", True, True),
        ("I have no idea.", r"#### \frac{1}{2}", False, False),
        (r"#### \frac{1}{2}", r"#### \frac{1}{2}", True, True),
        ("#### 1/2 of a cup", r"#### \frac{1}{2}", False, True),
        ("nope", "#### $5", False, False),
        ("#### $5", "#### $5", True, True),
        ("#### 5", "#### $5", False, True),
        ("nope", "#### .5", False, False),
        ("#### .5", "#### .5", True, True),
        ("#### 0.5", "#### .5", False, True),
        ("#### 1/3", "#### 1/2", False, False),
        ("#### 1/2", "#### 1/2", True, True),
        ("#### 2", "#### 2/3", False, False),
        ("#### 2/3", "#### 2", False, False),
        ("#### 1/3\n#### 2", "#### 2", False, True),  # strictly the first one counts, by math-verify the last
        ("#### 2", "#### 2 1/2", False, False),
        ("#### 21/2", "#### 2 1/2", False, False),
        ("#### 10:45", "#### 10:30", False, False),
        ("#### 1", "#### 1e3", False, False),
        ("#### (1, 2)", "#### (1, 2)", True, True),
        ("so (1, 3)", "#### (1, 2)", False, False),
        (r"so $(1, 2)$", "#### (1, 2)", False, True),
        (r"so $12$", "#### (1, 2)", False, False),
        ("#### 72", "#### 72 clips", True, True),
        ("####", "####", False, False),
        ("I have no idea.", "####", False, False),
        ("I have no idea.", r"so \boxed{\frac{1}{2}", False, False),
        (r"so \boxed{2", r"so \boxed{1", False, False),
    ],
)
def test_made_up_solutions(text, reference, strictly, mathematically):
    assert strict(text, reference) is strictly
    if mathematically is not None:
        assert right(text, reference) is mathematically


def test_a_thread_judges_too():
    found = []
    thread = threading.Thread(target=lambda: found.append(right("The answer is 72.", GSM8K)))
    thread.start()
    thread.join()
    assert found == [True]


@pytest.mark.parametrize(
    ("text", "held"),
    [
        (r"\boxed{1} and \boxed{\frac{a}{\sqrt{b}}}.", r"\frac{a}{\sqrt{b}}"),
        (r"\boxed{}", ""),
        ("none", None),
        (r"\boxed{a{b}", None),
    ],
)
def test_the_last_box(text, held):
    assert last_boxed(text) == held


@needs_shared
def test_every_reference_of_gsm8k_and_math_is_right_by_itself():
    rows = [json.loads(line) for line in (SHARED / "data/gsm8k/test.jsonl").read_text().splitlines()]
    for row in rows:
        number = row["answer"].split("#### ")[1].replace(",", "")
        assert strict(f"#### {number}", row["answer"]), row["answer"]
        assert not strict(f"#### {number}1", row["answer"])
    assert all(right(f"The answer is {row['answer'].split('#### ')[1]}.", row["answer"]) for row in rows[:100])
    solutions = [
        json.loads(line)["solution"] for line in (SHARED / "data/math/MATH/test.jsonl").read_text().splitlines()
    ]
    boxes = [last_boxed(solution) for solution in solutions]
    assert all(boxes)
    assert all(strict(rf"so \boxed{{{box}}}", solution) for box, solution in zip(boxes, solutions, strict=True))
    plain = [(box, whole) for box, whole in zip(boxes, solutions, strict=True) if re.fullmatch(r"-?\d+", box)][:50]
    assert all(right(f"We get {box}", whole) for box, whole in plain)
    assert not any(right(f"We get {int(box) + 1}", whole) for box, whole in plain)


def test_pass_at_k_is_the_share_of_draws_with_a_right_one():
    for n, k in itertools.product(range(1, 7), range(1, 7)):
        for count in range(n + 1):
            answers = [number < count for number in range(n)]
            if k > n:
                with pytest.raises(ValueError, match="between 1 and the number of answers"):
                    pass_at_k(answers, k)
                continue
            draws = [any(draw) for draw in itertools.combinations(answers, k)]
            assert pass_at_k(answers, k) == pytest.approx(sum(draws) / len(draws), abs=1e-12)
