r"""Graders: pairs of answers with their verdicts, metrics by their definitions, the judge's walls."""

import itertools
import os
import signal
import sys
import threading
import time
from fractions import Fraction

import pytest

import graders
from graders import GRADERS, boxed, final_answer, grade, grader_of, number, split_think
from infra import judge
from infra.judge import Judge

HAS_MATH_VERIFY = graders.symbolic_grading_available()


# --------------------------------------------------------------------------- pairs with a verdict

RIGHT = [  # grader, said, truth
    # letters of options
    ("auto", "B", "B"),
    ("auto", "(B)", "B"),
    ("auto", "B)", "B"),
    ("auto", "B.", "B"),
    ("auto", "B. 12", "B"),
    ("auto", "(B) 12", "B"),
    ("auto", "B: a dog", "B"),
    ("auto", r"\text{(B)}", "B"),
    ("auto", r"\textbf{B}", "B"),
    ("auto", "**B**", "B"),
    ("auto", "b", "B"),
    ("auto", "Ｂ", "B"),
    ("auto", "B", "(B)"),
    ("auto", "(b)", "B."),
    ("auto", "The answer is B", "B"),
    ("auto", "The answer is (B).", "B"),
    ("auto", "Answer: B", "B"),
    ("auto", "Option B", "B"),
    ("auto", "B、猫", "B"),
    ("auto", "答案是B", "B"),
    ("mcq", "I think it is B", "B"),
    ("mcq", "The correct option is (C).", "C"),
    ("mcq", "选B", "B"),
    ("mcq", "It must be D, because of the color", "D"),
    ("mcq", "A", "A"),
    ("mcq", "B", "B. a dog"),
    # written numbers
    ("auto", "1{,}000", "1000"),
    ("auto", r"1\,000", "1000"),
    ("auto", "1,000", "1000"),
    ("auto", "1,234,567.5", "1234567.5"),
    ("auto", r"\frac{-1}{2}", "-1/2"),
    ("auto", r"-\frac{1}{2}", "-0.5"),
    ("auto", r"\frac{1}{-2}", "-1/2"),
    ("auto", r"\frac12", "0.5"),
    ("auto", r"\frac 1 2", "0.5"),
    ("auto", r"\dfrac{3}{4}", "0.75"),
    ("auto", r"1\frac{1}{2}", "1.5"),
    ("auto", "1½", "1.5"),
    ("auto", "(-1)/2", "-0.5"),
    ("auto", r"\frac{1{,}000}{2}", "500"),
    ("auto", "−5", "-5"),
    ("auto", "－5", "-5"),
    ("auto", "- 5", "-5"),
    ("auto", "５", "5"),
    ("auto", "１２．５", "12.5"),
    ("auto", "$5$", "5"),
    ("auto", r"\(5\)", "5"),
    ("auto", r"\[5\]", "5"),
    ("auto", r"\$5", "5"),
    ("auto", "5。", "5"),
    ("auto", "(5)", "5"),
    ("auto", r"50\%", "50%"),
    ("auto", "50 %", "50%"),
    ("auto", "50 percent", "50%"),
    ("auto", "50%", "0.5"),
    ("auto", "50％", "50"),
    ("auto", r"2 \times 10^{3}", "2000"),
    ("auto", r"2.5 × 10^{-3}", "0.0025"),
    ("auto", "10^3", "1000"),
    ("auto", r"90^\circ", "90"),
    ("auto", "90°", "90"),
    ("auto", "x = 3", "3"),
    ("auto", r"\boxed{5}", "5"),
    ("auto", "5", r"\boxed{5}"),
    ("auto", "5", 5),
    ("auto", "5", 5.0),
    ("auto", "yes", True),
    ("auto", "crimson", ["red", "Crimson"]),
    ("number", "0", "-0.0"),
    # texts
    ("auto", "Red.", "red"),
    ("auto", "“red”", "red"),
    ("auto", "red  circle", "red circle"),
    ("auto", "红色。", "红色"),
    ("auto", "(1, 2)", "(1,2)"),
    ("auto", "x + 1", "x+1"),
    # structures: the same thing on both sides
    ("symbolic", "2x+y=3", "2x+y=3"),
    ("symbolic", "3=2x+y", "2x+y=3"),
    ("symbolic", "y = 2x + 1", "y=2x+1"),
    ("symbolic", "x = 3", "3"),
    ("symbolic", "3", "x = 3"),
    ("symbolic", r"\theta_1 = 3", "3"),
    ("symbolic", "x=1, y=2", "y=2, x=1"),
    ("symbolic", r"\begin{cases} x=1 \\ y=2 \end{cases}", "x=1, y=2"),
    ("symbolic", r"x=2 \text{ or } x=-2", r"x=-2 \text{ or } x=2"),
    ("symbolic", r"\{1, 2\}", r"\{2, 1\}"),
    ("symbolic", r"\left\{ \frac{1}{2}, 3 \right\}", r"\{3, 0.5\}"),
    ("symbolic", "[0, 1)", "[0,1)"),
    ("symbolic", r"(-\infty, 3]", r"(-\infty,3]"),
    ("symbolic", r"[0,1) \cup (2,3)", r"(2,3)\cup[0,1)"),
    ("symbolic", r"x \in [0,1)", "[0,1)"),
    ("symbolic", r"\left(\frac12, 3\right)", "(0.5, 3)"),
    ("symbolic", r"\sum_{i=1}^{n} i", r"\sum_{i=1}^n i"),
    ("symbolic", r"\sum_{i=1}^{n} i^2", r"\sum_{i=1}^{n} i^2"),
    ("symbolic", "x > 3", "3 < x"),
    ("symbolic", r"x \ge 3", r"x \geq 3"),
    ("symbolic", "1 < x < 2", "2 > x > 1"),
    ("symbolic", r"x \neq 0", r"x \ne 0"),
    ("symbolic", r"3 \text{ cm}", "3 cm"),
    ("symbolic", r"3 \mathrm{cm}^2", r"3 \text{ cm}^2"),
    ("symbolic", r"3 \text{ cm}", "3"),
    ("symbolic", r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    ("symbolic", r"\pm 2", r"\pm 2"),
    ("symbolic", "2^{10}", "1024"),
    ("symbolic", "2+3*4", "14"),
    ("symbolic", r"A \cap B", r"A\cap B"),
    ("symbolic", "100!", "100!"),
    ("list", "red, blue", "blue, red"),
    ("list", "[1, 2.0]", "2, 1"),
    ("list", r"\{0, 1\}", "1, 0.0"),
    # boxes, in any spelling
    ("box", "[0.1, 0.2, 0.5, 0.6]", "[0.1, 0.2, 0.5, 0.6]"),
    ("box", '{"bbox_2d": [10, 20, 300, 400]}', "[10, 20, 300, 400]"),
    ("box", '[{"bbox_2d": [10, 20, 300, 400], "label": "car 2"}]', "10 20 300 400"),
    ("box", "(10,20),(300,400)", "[10,20,300,400]"),
    ("box", "<box>(10,20),(300,400)</box>", "[10,20,300,400]"),
    ("box", "[10000, 20000, 30000, 40000]", "10000 20000 30000 40000"),
    ("box", "[-10, -20, 30, 40]", "-10 -20 30 40"),
    ("box", "[12.5, 20.25, 30.75, 40]", "12.5, 20.25, 30.75, 40"),
    ("box", "circle northwest 25 50 400 425", "circle northwest 25 50 400 425"),
    ("yesno", "Yes, there is a dog.", "yes"),
    ("yesno", "There is no dog", "no"),
]

WRONG = [
    # two letters, another one, none
    ("auto", "C", "B"),
    ("auto", "A or B", "B"),
    ("auto", "B or C", "B"),
    ("auto", "B and C", "B"),
    ("auto", "A, B", "B"),
    ("auto", "B, C", "B"),
    ("auto", "B/C", "B"),
    ("auto", "AB", "B"),
    ("auto", "A B C D", "B"),
    ("auto", "(A)(B)", "B"),
    ("auto", "B. 12 C. 13", "B"),
    ("auto", "B. 12 or C", "B"),
    ("auto", "not B", "B"),
    ("auto", "The answer is not B", "B"),
    ("auto", "The answer is A or B", "B"),
    ("auto", "The answer is A. The answer is B.", "B"),
    ("auto", "A dog", "A"),
    ("auto", "the answer is a dog", "A"),
    ("auto", "12", "B"),
    ("mcq", "A bird is here", "A"),
    ("mcq", "I think so", "I"),
    ("mcq", "Not B", "B"),
    ("mcq", "It isn't B", "B"),
    ("mcq", "neither A nor B", "B"),
    ("mcq", "B would be wrong", "B"),
    ("mcq", "either B or C", "B"),
    ("mcq", "A. no, B", "B"),
    # numbers that are others, or none
    ("auto", "1,00", "100"),
    ("auto", "1.000", "1000"),
    ("auto", "1 2", "12"),
    ("auto", "3, 400", "3400"),
    ("auto", "5(3)", "53"),
    ("auto", "1,2", "12"),
    ("auto", "0.333", "1/3"),
    ("auto", "0.3333333333", "1/3"),
    ("auto", r"\frac{1}{0}", "0"),
    ("auto", r"\frac{1}{3}", "3"),
    ("auto", "5-", "5"),
    ("auto", "--5", "-5"),
    ("auto", "5", "-5"),
    ("auto", "±5", "5"),
    ("auto", "5%", "0.5"),
    ("auto", "50%", "5"),
    ("auto", "0.5%", "0.005%"),
    ("auto", "1e1", "10"),
    ("auto", "٣", "3"),
    ("auto", "³", "3"),
    ("auto", "0x3", "3"),
    ("auto", "2+1", "3"),
    ("auto", "3 or 4", "3"),
    ("auto", "3, 4", "3"),
    ("auto", "3 = 3", "3"),
    ("auto", "about 3", "3"),
    ("auto", "3?", "3"),
    ("auto", "5!", "5"),
    ("auto", r"10^{-3}", "1000"),
    ("auto", "nan", "0"),
    ("auto", "__import__('os').getpid()", "3"),
    ("auto", "None", "3"),
    ("auto", "", "3"),
    ("auto", "3", ""),
    ("auto", "3", None),
    ("auto", "3", []),
    ("auto", "None", None),
    ("auto", "['A', 'B']", ["A", "B"]),
    # texts
    ("auto", "not red", "red"),
    ("auto", "red circle", "red"),
    ("auto", "redblue", "red"),
    ("auto", "red blue", "redblue"),
    # structures that are others
    ("symbolic", r"3 \text{ cm}", r"3 \text{ m}"),
    ("symbolic", "3 cm", "3 m"),
    ("symbolic", r"3 \text{ cm}", r"3 \text{ cm}^2"),
    ("symbolic", "3m", "3"),
    ("symbolic", r"\text{not } 3", "3"),
    ("symbolic", r"3 \text{ or } 4", "3"),
    ("symbolic", "3 or 4", "3"),
    ("symbolic", "3, 4", "3"),
    ("symbolic", "3$ or $4", "3"),
    ("symbolic", "3 = 3", "3"),
    ("symbolic", "4 = 3", "3"),
    ("symbolic", "x = 3", "y = 3"),
    ("symbolic", "x = 3, 4", "3"),
    ("symbolic", "x=1, y=2", "x=2, y=1"),
    ("symbolic", r"\{1, 2\}", r"\{1, 3\}"),
    ("symbolic", r"\{1, 2, 3\}", r"\{1, 2\}"),
    ("symbolic", "(1, 2)", "(2, 1)"),
    ("symbolic", "(0, 1)", "[0, 1]"),
    ("symbolic", "[0, 1)", "(0, 1]"),
    ("symbolic", r"(1, 2)", r"\{1, 2\}"),
    ("symbolic", "x > 3", "x < 3"),
    ("symbolic", r"x \ge 3", "x > 3"),
    ("symbolic", r"\sum_{i=1}^{n} i", r"\sum_{i=0}^{n} i^2"),
    ("symbolic", "2", r"\pm 2"),
    ("symbolic", "0.333333", r"\frac{1}{3}"),
    ("symbolic", "1.414214", r"\sqrt{2}"),
    ("symbolic", r"\{1\}", "1"),
    ("symbolic", "x", "y"),
    ("symbolic", "9^{9^{9^{9}}}", "1"),
    ("symbolic", "9**9**9", "1"),
    ("symbolic", "(10^{8})!", "1"),
    ("symbolic", "99999999!!", "1"),
    ("symbolic", "(" * 140 + "1" + ")" * 140, "1"),
    ("symbolic", "2^" * 100 + "2", "4"),
    ("list", "red, red, blue", "blue, red"),
    ("list", "red, blue, green", "red, blue"),
    # boxes: others, none, several
    ("box", "[-10, -20, 30, 40]", "10 20 30 40"),
    ("box", "[0.1, 0.2, 0.5, 0.6]", "[100, 200, 500, 600]"),
    ("box", "[1, 2, 3, 4], [5, 6, 7, 8]", "[1, 2, 3, 4]"),
    ("box", "1 2 3 4 5", "1 2 3 4"),
    ("box", "1 2 3", "1 2 3"),
    ("box", "3 4 1 2", "1 2 3 4"),
    ("box", "1 2 3 4", "3 4 1 2"),
    ("box", "a box", "a box"),
    ("yesno", "banana", "yes"),
    ("yesno", "yes and no", "yes"),
    ("yesno", "", "yes"),
]


@pytest.mark.parametrize("grader,said,truth", RIGHT)
def test_what_is_equal(grader, said, truth):
    assert grade(said, truth, grader) == 1


@pytest.mark.parametrize("grader,said,truth", WRONG)
def test_what_must_be_refused(grader, said, truth):
    assert grade(said, truth, grader) == 0


def test_there_are_a_hundred_and_fifty_pairs_and_no_two_alike():
    pairs = {(g, s, repr(t)) for g, s, t in RIGHT + WRONG}
    assert len(pairs) == len(RIGHT) + len(WRONG) >= 150 and len(WRONG) >= 60


@pytest.mark.skipif(not HAS_MATH_VERIFY, reason="math-verify is not installed")
@pytest.mark.parametrize(
    "said,truth,equal",
    [
        ("(x+1)^2", "x^2+2x+1", 1),
        (r"\sqrt{8}", r"2\sqrt{2}", 1),
        (r"\frac{x^2-1}{x-1}", "x+1", 1),
        ("y = 3 - 2x", "2x + y = 3", 1),
        ("f(x) = x + 1", "1 + x", 1),
        (r"\{\sqrt{4}, x+x\}", r"\{2x, 2\}", 1),
        ("(x+1)^2", "x^2+1", 0),
        ("y = 3 + 2x", "2x + y = 3", 0),
        (r"\sqrt{2}", r"\sqrt{3}", 0),
    ],
)
def test_terms_are_compared_by_math_verify(said, truth, equal):
    assert grade(said, truth, "symbolic") == equal


def test_without_math_verify_arithmetic_is_exact_and_it_is_said(monkeypatch):
    monkeypatch.setattr(graders.importlib.util, "find_spec", lambda name: None)
    assert not graders.symbolic_grading_available()
    assert "pip install math-verify" in graders.symbolic_note({"symbolic"})
    assert graders.symbolic_note({"auto"}) == ""
    for said, truth, equal in (
        (r"\frac{2}{4}", r"\frac{1}{2}", 1),
        ("2^3", "8", 1),
        ("x + 1", "x+1", 1),
        ("(x+1)^2", "x^2+2x+1", 0),
        ("9^9^9^9", "1", 0),
    ):
        assert grade(said, truth, "symbolic") == equal, (said, truth)


def test_every_grader_refuses_a_missing_answer_and_hostile_lengths_cost_little():
    began = time.process_time()
    for name in GRADERS:
        assert grade("", "3", name) == 0 == grade(None, "3", name) == grade(" ", "3", name), name
        for text in ("9" * 10**6, "(" * 20000, "1," * 10000, "\\frac{" * 3000, "(B) " * 5000):
            grade(text, text[:300], name)
            grade(text[:300], text[:300], name)
    assert time.process_time() - began < 30  # linear: a quadratic scan takes minutes
    with pytest.raises(ValueError, match="unknown grader 'vibes'; choose from auto"):
        grade("3", "3", "vibes")


def test_facts_name_the_grader_or_the_family_does():
    assert grader_of({}) == "auto" and grader_of({"family": "counting"}) == "auto"
    assert grader_of({"family": "caption"}) == "phrases"
    assert grader_of({"family": "grounding"}) == "box"
    assert grader_of({"family": "caption", "grader": "details"}) == "details"
    with pytest.raises(ValueError, match="unknown grader"):
        grader_of({"grader": "vibes"})


@pytest.mark.parametrize(
    "text,chain,said",
    [
        ("<think>a</think>b", "a", "b"),
        (" <think>a</think>b", "a", "b"),
        ("b", None, "b"),
        ("<think>a", None, ""),
        ("b<think>a", None, "b"),
        ("a</think>b", None, "b"),
        ("<think>a</think>b<think>c", None, "b"),
        ("<think>a<think>b</think>c", None, "c"),
        ("<Think>a</Think>b", None, "<Think>a</Think>b"),
    ],
)
def test_what_is_said_is_said_outside_of_thinking(text, chain, said):
    assert split_think(text) == (chain, said)


def test_a_final_answer_is_the_one_box_or_the_words():
    assert final_answer("<think>\\boxed{1}</think>so \\boxed{2}.") == "2"
    assert final_answer(" red ") == "red"
    assert final_answer("\\boxed{1} \\boxed{2}") == "\\boxed{1} \\boxed{2}"
    assert boxed("\\boxed{a\\}b}") == "a\\}b" and boxed("\\boxed{" + "a" * 2000 + "}") is None


def test_a_number_is_exact():
    assert number("0.1") * 3 == number("0.3") and number(r"\frac{1}{3}") == Fraction(1, 3)
    assert number("40%") == 40 and number("12,34") is None and number("9" * 500) is None


# ------------------------------------------------------------ metrics by their published definitions

# Exact match, arXiv 1606.05250: lower case, no punctuation, no articles, white space fixed.
EXACT_TABLE = {  # truth: (what equals it, what does not)
    "The red circle": (
        "red circle|Red Circle.|a red circle|the  red\ncircle|RED CIRCLE!|red circle,|(red) circle",
        "red|circle red|red circles|redcircle|the|red-circle",
    ),
    "42": ("42|42.|$42|42%|the 42|4,2|4.2", "43|4 2|forty-two|042|42 0|4|24"),
    "U.S.": ("US|us|u.s|The U.S.|'US'", "USA|u s|United States"),
    "anthem": ("Anthem|an anthem", "them|an them|nthem"),
}
EXACT = [
    (said, truth, verdict)
    for truth, sides in EXACT_TABLE.items()
    for words, verdict in zip(sides, (1, 0))
    for said in words.split("|")
]

# Multiple choice, after VLMEvalKit's rules (arXiv 2407.11691): one option's letter and no other one.
CHOICE_TABLE = {  # truth: (what names it, what does not)
    "B": (
        "B|b|(B)|[B]|B)|B.|B:|**B**|B. a dog|(B) a dog|B: a dog|B) a dog|Answer: B|The answer is B|"
        "The answer is (B).|the correct answer is B.|Option B|option (b)|I choose B|It is B, a dog|"
        "B because it barks|So it must be B|答案是B|选B|故选：B|\\boxed{B}|$B$|My choice: B!",
        "A|C.|(D)|AB|A or B|B or C|A, B|B/C|(A)(B)|A. cat B. dog|not B|It is not B|neither|a dog|"
        "The answer is A|the answer is A or B|none of them|B and C|I am not sure, B?|ABCD|A B C D|E",
    ),
    "A": (
        "A|a|A.|(a)|The answer is A|A. cat|It is A",
        "A cat|a cat|A bird is here|the answer is a cat|B",
    ),
}
CHOICES = [
    (said, truth, verdict)
    for truth, sides in CHOICE_TABLE.items()
    for words, verdict in zip(sides, (1, 0))
    for said in words.split("|")
]

# ANLS, arXiv 1905.13648: edits / longer, both counted by hand; below one half nothing.
READING = [  # said, truth, edits, length of the longer
    ("hello", "hello", 0, 5),
    ("Hello", "hello", 0, 5),
    (" hello ", "hello", 0, 5),
    ("hallo", "hello", 1, 5),
    ("helo", "hello", 1, 5),
    ("helloo", "hello", 1, 6),
    ("ehllo", "hello", 2, 5),
    ("help", "hello", 2, 5),
    ("hell", "hello", 1, 5),
    ("he", "hello", 3, 5),
    ("h", "hello", 4, 5),
    ("world", "hello", 4, 5),
    ("hello world", "hello", 6, 11),
    ("hello  world", "hello world", 0, 11),
    ("hello wrld", "hello world", 1, 11),
    ("goodbye", "hello", 6, 7),
    ("kitten", "sitting", 3, 7),
    ("sunday", "saturday", 3, 8),
    ("flaw", "lawn", 2, 4),
    ("rosettacode", "raisethysword", 8, 13),
    ("ab", "ba", 2, 2),
    ("abc", "abd", 1, 3),
    ("abcd", "ab", 2, 4),
    ("abcde", "ab", 3, 5),
    ("12", "13", 1, 2),
    ("123", "124", 1, 3),
    ("1999", "1998", 1, 4),
    ("a", "a", 0, 1),
    ("a", "b", 1, 1),
    ("abc def", "abcdef", 1, 7),
    ("a b c", "abc", 2, 5),
    ("INVOICE 12", "invoice 21", 2, 10),
    ("$5.00", "$5.00", 0, 5),
    ("5.00", "$5.00", 1, 5),
    ("5", "$5.00", 4, 5),
    ("总计", "总计", 0, 2),
    ("总", "总计", 1, 2),
    ("合计", "总计", 1, 2),
    ("book", "back", 2, 4),
    ("intention", "execution", 5, 9),
]

# Relaxed accuracy, arXiv 2203.10244, section 5.1: within 5 % of the truth, else the same text.
RELAXED_TABLE = {
    "100": (
        "100|95|105|100.0|96.5|1e2| 100 |10400%",
        "94.9|105.1|-100|0|1000|100 cm|about 100|nan|inf|95%",
    ),
    "-40": ("-40|-42|-38", "-42.1|40|-37.9"),
    "5%": ("5%|0.05|5.2%", "5|5.3%|4.7%"),
    "0": ("0", "0.0|0.01"),
    "Blue": ("blue|BLUE", "blues|dark blue"),
    "2018": ("2018|1950", "1900"),
}
RELAXED = [
    (said, truth, verdict)
    for truth, sides in RELAXED_TABLE.items()
    for words, verdict in zip(sides, (1, 0))
    for said in words.split("|")
]

# VQA accuracy, arXiv 1505.00468: m of ten annotators agree -> 0, .3, .6, .9, 1 (leave one out, by hand).
BY_MATCHES = [0, 0.3, 0.6, 0.9, 1, 1, 1, 1, 1, 1]
VQA = (
    [("red", ["red"] * m + ["blue"] * (10 - m), BY_MATCHES[m]) for m in range(10)]
    + [("two", ["2"] * m + ["3"] * (10 - m), BY_MATCHES[m]) for m in range(10)]
    + [("red", ["red"] * 10, 1), ("Red", ["red"] * 10, 0), ("blue", ["red"] * 10, 0)]
    + [
        (said, ["red"] * 4 + ["blue"] * 6, 1)
        for said in ("Red", "the red", "red.", "a red", " red\n", "red!")
    ]
    + [(said, ["red"] * 4 + ["blue"] * 6, 0) for said in ("reddish", "red blue", "", "r ed")]
    + [(said, ["don't"] * 4 + ["can't"] * 6, 1) for said in ("dont", "don't", "Don't")]
    + [(said, ["1000"] * 4 + ["2"] * 6, 1) for said in ("1,000", "1000", "1000.")]
    + [("t shirt", ["t-shirt"] * 2 + ["jeans"] * 8, 0.6), ("none", ["0"] * 3 + ["1"] * 7, 0.9)]
)

# Acc@0.5 by intersection over union, areas by hand: truth 0 0 10 10.
OVERLAP = [(f"0 0 10 {h}", "0 0 10 10", Fraction(h, 10)) for h in range(1, 11)]
OVERLAP += [(f"0 {y} 10 {y + 10}", "0 0 10 10", Fraction(10 - y, 10 + y)) for y in range(1, 11)]
OVERLAP += [(f"{x} 0 {x + 10} 10", "0 0 10 10", Fraction(10 + x, 10 - x)) for x in range(-10, 0)]
OVERLAP += [
    (f"{i} {i} {10 - i} {10 - i}", "0 0 10 10", Fraction((10 - 2 * i) ** 2, 100))
    for i in range(1, 5)
]
OVERLAP += [
    ("20 20 30 30", "0 0 10 10", Fraction(0)),
    ("0 0 20 20", "0 0 10 10", Fraction(1, 4)),
    ("-10 -10 10 10", "0 0 10 10", Fraction(1, 4)),
    ("0 0 .5 .5", "0 0 1 1", Fraction(1, 4)),
    ("0.5 0 1.5 1", "0 0 1 1", Fraction(1, 3)),
    ("5 5 15 15", "0 0 10 10", Fraction(1, 7)),
]

# F1 of phrases: 2 shared / (said + true).
PHRASES = [
    (said, "red ring, blue cube", Fraction(shared * 2, many + 2))
    for said, shared, many in (
        ("red ring, blue cube", 2, 2),
        ("blue cube, red ring", 2, 2),
        ("red ring", 1, 1),
        ("blue cube", 1, 1),
        ("red ring, red ring", 1, 2),
        ("red ring, blue cube, black dot", 2, 3),
        ("black dot", 0, 1),
        ("black dot, red dot", 0, 2),
        ("red cube, blue ring", 0, 2),
        ("Red ring, Blue cube.", 2, 2),
        ("red ring,blue cube", 2, 2),
        (" red ring , blue cube ", 2, 2),
        ("red ring, blue", 1, 2),
        ("red", 0, 1),
        ("red ring blue cube", 0, 1),
        ("red ring, , blue cube", 2, 2),
        ("red ring,", 1, 1),
        ("ring red", 0, 1),
        ("red ring, blue cube, red ring", 2, 3),
        ("red ring, blue cube, red ring, blue cube", 2, 4),
    )
]
PHRASES += [
    (", ".join("abcdefghij"[:n]), ", ".join("abcdefghij"[:m]), Fraction(2 * min(n, m), n + m))
    for n, m in itertools.product((1, 2, 5, 10), (1, 3, 5, 7, 10))
]


@pytest.mark.parametrize(
    "name", ["exact", "mcq", "anls", "relaxed", "vqa", "iou", "box", "phrases"]
)
def test_a_metric_equals_its_definition_on_forty_cases(name):
    fractions = [
        (said, truth, 1 - Fraction(edits, longer)) for said, truth, edits, longer in READING
    ]
    cases = {
        "exact": EXACT,
        "mcq": CHOICES,
        "anls": [(said, truth, v if v >= Fraction(1, 2) else 0) for said, truth, v in fractions],
        "relaxed": RELAXED,
        "vqa": VQA,
        "iou": OVERLAP,
        "box": [(said, truth, v >= Fraction(1, 2)) for said, truth, v in OVERLAP],
        "phrases": PHRASES,
    }[name]
    assert len(cases) >= 40
    for said, truth, score in cases:
        assert grade(said, truth, name) == pytest.approx(float(score)), (said, truth)


def test_vqa_accuracy_of_fewer_annotators():
    assert grade("red", ["red"], "vqa") == 1 == grade("the Red", "red", "vqa")
    assert grade("red", ["red", "red", "blue"], "vqa") == pytest.approx(2 / 3)
    assert grade("red", ["blue"], "vqa") == 0


def test_a_detailed_caption_is_scored_by_what_it_names():
    truth = "A small red dog sits on the wooden table. Two cups stand near the dog."
    said = {
        truth: 1.0,
        "a dog, red and small, sits near two cups on a wooden table and they stand": 1.0,
        "": 0.0,
        "The image shows a": 0.0,
    }
    for caption, score in said.items():
        assert grade(caption, truth, "details") == pytest.approx(score), caption

    # objects dog of dog, sit, table, cup, stand: F1 1/3; attributes red of 4: 2/5; relations none of 2
    assert grade("red dog", truth, "details") == pytest.approx((5 / 3 + 5 * 2 / 5) / 12)
    invented = grade(
        "A small red cat sits on the wooden table. Two cups stand near the cat.", truth, "details"
    )
    assert grade("red dog", truth, "details") < invented < 1


# --------------------------------------------------------------------------------------- the judge

SCRIPT = """
import os, sys, time
print("ready", flush=True)
for line in sys.stdin:
    number, _, question = line.strip().partition(" ")
    if "die" in question:
        os._exit(1)
    verdict = "" if "slow" in question else "equal" if question.count("x") == 2 else "different"
    print(number, verdict, flush=True)
"""


def stand_in(script=SCRIPT):
    return Judge((sys.executable, "-c", script))


def test_a_judge_that_is_killed_is_replaced_and_the_question_asked_again():
    judge_ = stand_in()
    assert judge_.ask("x", "x") is True and judge_.ask("y", "x") is False and judge_.lost == 0
    first = judge_.server.process
    os.kill(first.pid, signal.SIGKILL)
    assert judge_.ask("x", "x") is True and judge_.server.process.pid != first.pid
    os.kill(judge_.server.process.pid, signal.SIGKILL)
    judge_.server.process.wait()
    assert judge_.ask("x", "x") is True
    judge_.stop()
    assert judge_.ask("x", "x") is True
    judge_.stop()


def test_a_question_that_kills_its_judge_is_wrong_and_counted():
    judge_ = stand_in()
    assert judge_.ask("die", "x") is False and judge_.lost == 1
    assert judge_.ask("slow", "x") is False and judge_.lost == 2
    assert judge_.seconds < judge.SECONDS
    assert judge_.ask("x", "x") is True and not judge_.broken
    judge_.stop()


def test_a_stopped_judge_is_not_waited_for_for_ever(monkeypatch):
    monkeypatch.setattr(judge, "HUNG", 0.5)
    judge_ = stand_in()
    assert judge_.ask("x", "x") is True
    os.kill(judge_.server.process.pid, signal.SIGSTOP)
    assert judge_.ask("x", "x") is False and judge_.lost == 1
    assert judge_.ask("x", "x") is True
    judge_.stop()


def test_a_judge_that_cannot_start_is_reported_once(caplog, monkeypatch):
    broken = stand_in("raise RuntimeError('antlr 4.7 is not supported')")
    assert broken.ask("x", "x") is None and broken.ask("x", "x") is None
    assert caplog.text.count("cannot be started") == 1 and "antlr 4.7" in caplog.text
    monkeypatch.setattr(graders, "JUDGE", broken)
    assert not graders.symbolic_grading_available()
    assert "cannot be started: RuntimeError: antlr 4.7" in graders.symbolic_note({"symbolic"})
    assert grade("(x+1)^2", "x^2+2x+1", "symbolic") == 0 and grade("2^3", "8", "symbolic") == 1
    assert Judge(("/no/such/python",)).ask("x", "x") is None
    monkeypatch.setattr(judge, "PATIENCE", 0.3)
    assert stand_in("import time; time.sleep(60)").ask("x", "x") is None


def test_threads_ask_beside_each_other():
    judge_ = stand_in()
    verdicts = {}

    def ask(word):
        verdicts[word] = judge_.ask(word, "x")

    threads = [threading.Thread(target=ask, args=(w,)) for w in ("x", "y", "slow", "z")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert verdicts == {"x": True, "y": False, "slow": False, "z": False}
    judge_.stop()


@pytest.mark.skipif(not HAS_MATH_VERIFY, reason="math-verify is not installed")
def test_hostile_expressions_lose_their_child_alone():
    judge_ = Judge()
    assert judge_.ask("x+1", "1+x") is True
    server = judge_.server.process.pid

    # each would take minutes or gigabytes
    for hostile in ("9^{9^{9}}", "99999999!!"):
        assert judge_.ask(hostile, "1") is False
    assert judge_.seconds < judge.SECONDS and judge_.lost == 2
    assert judge_.ask("x", "x") is True and judge_.server.process.pid == server
    judge_.stop()


def test_what_shows_that_it_takes_long_is_not_asked():
    for text in ("9^{9^{9}}", "9**9**9", "(10^{8})!", "99999999!!", "500!", "2^{99999}", "(" * 31):
        assert graders.would_take_long(text), text
    for text in ("x^{2}", "(x^2)^3", "n!", "(n-1)!", "5!", "x_1^2+y^2", "e^{-x^2}", "2^{10}"):
        assert not graders.would_take_long(text), text
