"""Rewards: what each of many completions that try to be paid for nothing earns, and how parts combine."""

import math
import time

import pytest

import graders
import rewards
from graders import GRADERS, arithmetic, boxed, lists_equal, number, same_answer
from rewards import answer_reward, format_reward

T = "<think>a</think>"
VERDICTS = [  # completion, truth, answer reward, format reward
    # as asked
    (T + "\\boxed{3}", "3", 1, 1),
    (T + "so \\boxed{3}.", "3", 1, 1),
    (T + "\\boxed{3} and that is all", "3", 1, 1),
    (" \n" + T + "\\boxed{3}", "3", 1, 1),
    (T + "\\boxed{3.0}", "3", 1, 1),
    (T + "\\boxed{1/2}", "0.5", 1, 1),
    (T + "\\boxed{.5}", "1/2", 1, 1),
    (T + "\\boxed{1,000}", "1000", 1, 1),
    (T + "\\boxed{+3}", "3", 1, 1),
    (T + "\\boxed{03}", "3", 1, 1),
    (T + "\\boxed{Red }", "red", 1, 1),
    (T + "\\boxed{$3$}", "3", 1, 1),
    (T + "\\boxed{\\text{red}}", "red", 1, 1),
    (T + "\\boxed{\\frac{1}{2}}", "\\frac{1}{2}", 1, 1),
    (T + "\\boxed{\\dfrac{1}{2}}", "0.5", 1, 1),
    (T + "\\boxed{\\{1, 2\\}}", "\\{1, 2\\}", 1, 1),
    (T + "\\boxed{red  circle}", "red circle", 1, 1),
    (T + "\\boxed{3.}", "3", 1, 1),
    # no box, or not one
    ("", "3", 0, 0),
    ("3", "3", 0, 0),
    (T + "3", "3", 0, 0),
    (T + "the answer is 3", "3", 0, 0),
    (T + "boxed{3}", "3", 0, 0),
    (T + "\\fbox{3}", "3", 0, 0),
    (T + "\\boxed 3", "3", 0, 0),
    (T + "\\boxed {3}", "3", 0, 0),
    (T + "\\Boxed{3}", "3", 0, 0),
    (T + "\\boxed(3)", "3", 0, 0),
    (T + "\\boxed{3} \\boxed{4}", "3", 0, 0),
    (T + "\\boxed{3}\\boxed{3}", "3", 0, 0),
    (T + "\\boxed{\\boxed{3}}", "3", 0, 0),
    (T + "\\boxed{}", "", 0, 0),
    (T + "\\boxed{ }", " ", 0, 0),
    (T + "\\boxed{}3", "3", 0, 0),
    # braces
    (T + "\\boxed{3", "3", 0, 0),
    (T + "\\boxed{3}}", "3", 1, 1),
    (T + "\\boxed{{3}", "3", 0, 0),
    (T + "\\boxed{3\\}", "3", 0, 0),
    (T + "\\boxed{" + "{" * 50000, "3", 0, 0),
    (T + "\\boxed{" * 50000, "3", 0, 0),
    (T + "\\boxed{" + "9" * 5000 + "}", "9", 0, 0),
    # the box in the wrong place
    ("\\boxed{3}", "3", 1, 0),
    ("<think>\\boxed{3}</think>3", "3", 0, 0),
    ("<think>\\boxed{3}</think>\\boxed{4}", "4", 1, 0),
    ("<think>\\boxed{3}</think>\\boxed{4}", "3", 0, 0),
    ("\\boxed{3}<think>a</think>\\boxed{4}", "3", 0, 0),
    ("<think>\\boxed{3}", "3", 0, 0),  # still thinking
    # think tags
    ("<think></think>\\boxed{3}", "3", 1, 0),
    ("<think> \n</think>\\boxed{3}", "3", 1, 0),
    ("<think>a<think>b</think>\\boxed{3}", "3", 1, 0),
    ("a<think>b</think>\\boxed{3}", "3", 1, 0),
    ("<think>a</think></think>\\boxed{3}", "3", 1, 0),
    ("</think>a<think>\\boxed{3}", "3", 0, 0),
    ("a</think>\\boxed{3}", "3", 1, 0),
    ("\\boxed{4}</think>\\boxed{3}", "3", 1, 0),
    ("<think>a</think><think>b</think>\\boxed{3}", "3", 1, 0),
    ("<Think>a</Think>\\boxed{3}", "3", 1, 0),
    ("<think>a\\boxed{3}", "3", 0, 0),
    ("\\boxed{3}<think>a", "3", 1, 0),
    ("\\boxed{3}<think>a</think>\\boxed{4}", "4", 0, 0),
    (T + "\\boxed{<think>3}", "3", 0, 0),
    # several guesses in one box
    (T + "\\boxed{3 or 4}", "3", 0, 1),
    (T + "\\boxed{3, 4}", "3", 0, 1),
    (T + "\\boxed{0 1 2 3}", "3", 0, 1),
    (T + "\\boxed{3/4}", "3", 0, 1),
    (T + "\\boxed{34}", "3", 0, 1),
    (T + "\\boxed{1,2}", "12", 0, 1),
    (T + "\\boxed{red circle}", "red", 0, 1),
    (T + "\\boxed{yes no}", "yes", 0, 1),
    (T + "\\boxed{not red}", "red", 0, 1),
    (T + "\\boxed{redblue}", "red", 0, 1),
    (T + "\\boxed{\\text{3}\\text{4}}", "3", 0, 1),
    # numbers that are none, and code
    (T + "\\boxed{1/0}", "1", 0, 1),
    (T + "\\boxed{nan}", "3", 0, 1),
    (T + "\\boxed{inf}", "3", 0, 1),
    (T + "\\boxed{1e1}", "10", 0, 1),
    (T + "\\boxed{٣}", "3", 0, 1),
    (T + "\\boxed{³}", "3", 0, 1),
    (T + "\\boxed{0x3}", "3", 0, 1),
    (T + "\\boxed{2+1}", "3", 0, 1),
    (T + "\\boxed{--3}", "3", 0, 1),
    (T + "\\boxed{__import__('os').getpid()}", "3", 0, 1),
    (T + "\\boxed{(lambda: 3)()}", "3", 0, 1),
    (T + "\\boxed{answer}", "3", 0, 1),
    (T + "\\boxed{None}", "", 0, 1),
    (T + "\\boxed{None}", "3", 0, 1),
    (T + "\\boxed{" + "1/" * 30 + "1}", "1", 0, 1),
    (T + "\\boxed{.}", ".", 0, 1),
]


@pytest.mark.parametrize("completion,truth,right,form", VERDICTS)
def test_verdicts(completion, truth, right, form):
    began = time.perf_counter()
    assert (
        answer_reward(completion, truth, True) == right and format_reward(completion, True) == form
    )
    assert (
        answer_reward(completion, truth, False) == 0 == format_reward(completion, False)
    )  # cut off: nothing is earned
    assert time.perf_counter() - began < 5  # linear: a quadratic scan of these takes minutes


def test_there_are_at_least_sixty_and_no_two_alike():
    assert (
        len({v[:2] for v in VERDICTS}) == len(VERDICTS) >= 60
        and sum(v[2] == 0 for v in VERDICTS) >= 40
    )


def test_nothing_equals_a_missing_answer():
    assert (
        not same_answer(None, None)
        and not same_answer("", "")
        and not same_answer(None, "3")
        and not same_answer("3", None)
    )
    for name in GRADERS:
        assert (
            answer_reward(T + "\\boxed{}", "", True, name) == 0 == answer_reward(T, "3", True, name)
        ), name
    with pytest.raises(ValueError, match="unknown grader"):
        answer_reward(T + "\\boxed{3}", "3", True, "vibes")


def test_a_box_is_found_in_one_pass():
    assert (
        boxed("\\boxed{a\\\\}") == "a\\\\"
        and boxed("\\boxed{a\\}b}") == "a\\}b"
        and boxed("\\boxed{{a}{b}}") == "{a}{b}"
    )
    assert boxed("\\boxed{" + "a" * 2000 + "}") is None


def test_numbers_are_exact():
    assert (
        number("0.1") * 3 == number("0.3")
        and number("\\frac{1}{3}") != number("0.3333333")
        and number("40%") == 40
    )
    assert (
        number("1,234,567.5") == number("1234567.5")
        and number("12,34") is None
        and number("1 2") is None
    )


@pytest.mark.parametrize(
    "a,b,equal",
    [
        ("red, blue", "blue, red", 1),
        ("red, red, blue", "blue, red", 0),
        ("red", "red, blue", 0),
        ("[1, 2.0]", "2, 1", 1),
        ("{1, 1}", "1, 1", 1),
        ("1, 1", "1", 0),
        ("red, blue, green", "red, blue", 0),
    ],
)
def test_lists_match_in_any_order_each_item_once(a, b, equal):
    assert lists_equal(a, b) == equal


def test_boxes_and_reading_grade_by_overlap_and_distance():
    assert (
        GRADERS["box"]("[0, 0, 10, 10]", "0 0 10 10") == 1
        and GRADERS["box"]("0 0 10 10", "0 6 10 16") == 0
    )
    assert (
        graders.box_iou("0 0 10 10", "0 5 10 15") == pytest.approx(1 / 3)
        and graders.box_iou("0 0 10 10 20", "0 0 10 10") == 0
    )
    assert graders.box_iou("10 10 0 0", "0 0 10 10") == 0 == graders.box_iou("", "")
    assert (
        graders.anls("hello", "hello") == 1
        and graders.anls("hallo", "Hello") == 0.8
        and graders.anls("xyz", "hello") == 0
    )
    assert graders.anls("hello world " * 20, "hello") == 0


@pytest.mark.parametrize(
    "text,value",
    [
        ("2+3*4", 14),
        ("(2+3)*4", 20),
        ("2^3^2", 512),
        ("-2^2", -4),
        ("\\frac{1}{2}+\\frac{1}{3}", "5/6"),
        ("2 \\cdot 3", 6),
        ("1/3*3", 1),
        ("1/0", None),
        ("2+", None),
        ("2 3", None),
        ("x+1", None),
        ("", None),
        ("9^9^9^9", None),
        ("2^0.5", None),
        ("(" * 60 + "1" + ")" * 60, None),
        ("__import__", None),
        ("1" * 5000 + "^60", None),
        ("((9^64)^64)^64", None),
    ],
)
def test_arithmetic_is_exact_and_refuses_what_would_take_long(text, value):
    from fractions import Fraction

    assert arithmetic(text) == (None if value is None else Fraction(value))


# ------------------------------------------------------------------------------------------ mixed

FACTS = {
    "answer": "2",
    "family": "counting",
    "chain": "1 west red ring, 2 east red ring.",
    "words": "west red ring, east red ring",
}
FULL = "<think>1 west red ring, 2 east red ring.</think>\\boxed{2}"


def test_mixed_and_product_rewards():
    assert rewards.mixed_reward(FULL, FACTS, True) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="sum to 1"):
        rewards.mixed_reward(
            "x", {"answer": "3"}, True, {"answer": 1.0, "think": 0.2, "format": 0.1}
        )
    invented = FULL.replace("ring, 2", "cube, 2")
    assert rewards.parts(invented, FACTS, True) == {"answer": 1.0, "think": 0.0, "format": 1.0}
    assert rewards.product(rewards.parts(FULL, FACTS, True)) == 1.0
    assert rewards.COMBINE["verifiable"](rewards.parts(FULL, FACTS, True)) == 1.0
    assert rewards.verifiable({"answer": 1.0, "format": 0.0}) == 0.0
    assert rewards.verifiable({"answer": 0.5, "format": 1.0}) == 0.5
    assert rewards.product(rewards.parts(invented, FACTS, True)) == pytest.approx(0.1)
    assert rewards.mixed_reward(FULL, FACTS, False) == pytest.approx(0.2)


@pytest.mark.parametrize(
    "chain,box,think",
    [
        ("1 west red ring, 2 east red ring.", "2", 1),
        ("west red ring.", "west red ring", 1),
        ("west red ring.", "2", 0),
        ("", "2", 0),
        (" , .", "2", 0),
        ("1 west red ring, 2 east red ring.", "3", 0),
        ("2.", "2", 0),
        ("trust me, 2 east red ring.", "2", 0),
        ("east red ring.", "red ring", 1),
        ("1 west red ring, 2 east red ring.", "ed rin", 0),
    ],
)
def test_a_chain_says_what_is_true_and_what_it_answers(chain, box, think):
    assert rewards.think_reward(f"<think>{chain}</think>\\boxed{{{box}}}", FACTS) == think


@pytest.mark.parametrize(
    "reply,verdict",
    [
        ('{"logic": 1, "grounding": 1, "consistency": 1}', 1.0),
        ('{"logic": 1, "grounding": 0, "consistency": 1}', 0.0),
        ("yes", None),
        ("", None),
        ("[1]", None),
        ('{"logic": 1, "grounding": 1}', None),
        ('{"logic": 2, "grounding": 1, "consistency": 1}', None),
        ('{"logic": true, "grounding": 1, "consistency": 1}', None),
        ('{"logic": 1, "grounding": 1, "consistency": 1} sure!', None),
        ('```json\n{"logic": 1,\n"grounding": 1, "consistency": 1}\n```', 1.0),
        ('```\n{"logic": 1, "grounding": 0, "consistency": 1}\n```', 0.0),
        ('sure: ```{"logic": 1, "grounding": 1, "consistency": 1}```', None),
        ('```{"logic": 1, "grounding": 1, "consistency": 1}``` sure!', None),
    ],
)
def test_a_judges_reply_is_read_strictly(reply, verdict):
    asked = []

    def judge(prompt):
        asked.append(prompt)
        return reply

    assert rewards.judged_think_reward(FULL, "how many?", judge) == verdict
    assert "how many?" in asked[0] and "east red ring" in asked[0]
    mixed = rewards.weighted(rewards.parts(FULL, FACTS, True, judge))
    assert mixed != mixed if verdict is None else mixed == pytest.approx(0.8 + 0.2 * verdict)


def test_a_caption_is_graded_by_its_phrases_inside_the_box():
    facts = {"family": "caption", "answer": "red ring, blue cube", "chain": ""}
    assert rewards.parts("<think>x</think>\\boxed{blue cube, red ring}", facts, True)["answer"] == 1
    assert rewards.parts("<think>x</think>blue cube, red ring", facts, True)["answer"] == 0


@pytest.mark.parametrize(
    "chain,box,think",
    [
        ("two apples and three pears make 5.", "5", 1),
        ("it is a half, so 1/2", "0.5", 1),
        ("the ring is red, so I say red", "\\text{Red}", 1),
        ("the second option, so B", "B", 1),
        ("it is 5", "5", 1),
        ("just 5", "5", 0),
        ("there is no dog anywhere", "no", 1),
        ("two apples and three pears make 6.", "5", 0),
        ("5.", "5", 0),
        ("well 5 " + "and so on " * 60, "5", 0),
        ("there are 15 of them", "5", 0),
    ],
)
def test_without_a_reference_a_chain_must_come_to_its_answer(chain, box, think):
    """Rows that people have hold a truth and no chain: product must not pay right and wrong alike."""
    facts = {"answer": box}
    text = f"<think>{chain}</think>\\boxed{{{box}}}"
    assert rewards.think_reward(text, facts) == think
    assert rewards.product(rewards.parts(text, facts, True)) == pytest.approx(0.9 * think + 0.1)
    wrong = rewards.parts(text, {"answer": "other"}, True)
    assert rewards.product(wrong) == pytest.approx(0.1)


def test_several_truths_and_no_truth():
    text = T + "\\boxed{crimson}"
    assert rewards.answer_reward(text, ["red", "Crimson"], True) == 1
    assert rewards.answer_reward(text, None, True) == 0 == rewards.answer_reward(text, [], True)
    assert rewards.parts(text, {}, True)["answer"] == 0
    assert rewards.answer_reward(T + "\\boxed{5}", 5, True) == 1


def test_a_reward_that_is_no_number_has_no_verdict_or_is_an_error():
    checked = rewards.checked_parts({"reward": math.inf, "other": None, "fine": 1})
    assert math.isnan(checked["reward"]) and math.isnan(checked["other"]) and checked["fine"] == 1.0
    assert math.isnan(rewards.checked_parts({"reward": math.nan})["reward"])
    assert rewards.checked_parts({"reward": True}) == {"reward": 1.0}
    for wrong in (1.0, None, {}, {"answer": 1.0}, {"reward": "high"}, {"reward": [1]}):
        with pytest.raises(ValueError, match="a reward function returned"):
            rewards.checked_parts(wrong)


def test_a_judge_is_not_asked_about_no_chain():
    def judge(prompt):
        raise AssertionError("there is nothing to judge")

    for text in ("\\boxed{2}", "<think> </think>\\boxed{2}", "<think>a"):
        assert rewards.judged_think_reward(text, "how many?", judge) == 0
