"""Files of the drawn world with faults that were put in on purpose: what curation is counted against.

What it teaches: a filter is believed when it is known what it should have found. Every sample of these files
says in its facts what is wrong with it (`fault`), which no step reads.

    skewed        eleven families under four labels, the commonest 58 times the rarest
    partly_wrong  three answers in ten belong to another picture
    faulty_videos wrong answers, things at rest, questions that one frame answers
    faulty_chains what public chains of thought have: instructions, spellings, loops, inventions, duplicates
"""

import random
from dataclasses import replace
from typing import Callable

from curation.questions import last_question
from data.sample import Message, Sample
from data.world import MOVES, PLACES, REASONING, sample

Fault = Callable[[Sample, random.Random], Sample]  # a sample with something wrong


def drawn_samples(family: str, number: int, seed: int) -> list[Sample]:
    """Single questions of one family."""
    return [sample(i, seed, {family: 1.0}, turns=1) for i in range(number)]


def saying(one: Sample, said: str, **facts) -> Sample:
    """The sample with these words for its answer; `facts` are changed as well."""
    turn = Message("assistant", (said,))
    return replace(one, messages=(*one.messages[:-1], turn), facts=one.facts | facts)


def drawn_fault(rng: random.Random, shares: dict[str, float]) -> str:
    """The name of a fault as often as its share says, else ""."""
    names = [*shares, ""]
    weights = [*shares.values(), 1 - sum(shares.values())]
    return rng.choices(names, weights)[0]


# ------------------------------------------------------------------------------------ instructions

LABELS = {
    "look": ("attributes", "spatial", "caption", "grounding", "listing"),
    "read": ("reading", "charts"),
    "count": ("counting",),
    "reason": ("arithmetic", "odd", "video"),
}
SKEW = 1.7  # the n-th family has n ** -SKEW of the samples
WRONG = 0.3  # share of answers that belong to another picture
ASKED = ("attributes", "spatial", "counting", "charts")  # the families of these answers


def skewed(samples: int, seed: int) -> list[Sample]:
    """Families in a random order, each rarer than the one before; the task is the coarse label."""
    rng = random.Random(seed)
    label_of_family = {family: label for label, group in LABELS.items() for family in group}
    families = rng.sample(sorted(label_of_family), len(label_of_family))
    weights = [(place + 1) ** -SKEW for place in range(len(families))]

    # The oracle's lot is drawn by origin: each sample has its own
    found = []
    for family, weight in zip(families, weights):
        number = max(1, round(samples * weight / sum(weights)))
        label = label_of_family[family]
        for one in drawn_samples(family, number, seed):
            found.append(replace(one, task=label, origin=f"{family} {one.origin}"))
    return found


def partly_wrong(samples: int, seed: int) -> list[Sample]:
    """Some of the answers are those of another picture."""
    rng = random.Random(seed)
    found = []
    for family in ASKED:
        truths = drawn_samples(family, samples // len(ASKED), seed)
        answers = [one.facts["answer"] for one in truths]
        for one in truths:
            wrong = rng.random() < WRONG
            found.append(saying(one, rng.choice(answers)) if wrong else one)
    return found


# ----------------------------------------------------------------------------------------- videos


def nothing_wrong(one: Sample, rng: random.Random) -> Sample:
    return one


def wrong_move(one: Sample, rng: random.Random) -> Sample:
    others = [move for move in MOVES if move != one.facts["answer"]]
    return saying(one, rng.choice(others))


def at_rest(one: Sample, rng: random.Random) -> Sample:
    """The first frame again and again; the answer, that it moves nowhere, is right."""
    # The picture
    parts = one.messages[0].parts
    first = next(part for part in parts if not isinstance(part, str))
    frozen = tuple(part if isinstance(part, str) else first for part in parts)
    still = replace(one, messages=(Message("user", frozen), one.messages[1]))

    # What is known of it
    frames = one.facts["words"].split(", ")
    words = ", ".join(frames[:1] * len(frames))
    return saying(still, "nowhere", answer="nowhere", words=words)


def one_frame(one: Sample, rng: random.Random) -> Sample:
    """What shape it has, which any frame shows."""
    frame = one.facts["words"].split(", ")[0]
    shape = frame.split()[-1]
    *pictures, _ = one.messages[0].parts
    asked = Message("user", (*pictures, "what shape is it?"))
    about_shape = replace(one, messages=(asked, one.messages[1]))
    return saying(about_shape, shape, answer=shape)


VIDEO_FAULTS: dict[str, Fault] = {
    "nothing wrong": nothing_wrong,
    "wrong answer": wrong_move,
    "at rest": at_rest,
    "one frame is enough": one_frame,
}
VIDEO_SHARES = {"wrong answer": 0.08, "at rest": 0.06, "one frame is enough": 0.06}


def faulty_videos(samples: int, seed: int) -> list[Sample]:
    """Questions about videos, one in five with a fault."""
    rng = random.Random(seed)
    videos = []
    for one in drawn_samples("video", samples, seed):
        fault = drawn_fault(rng, VIDEO_SHARES) or "nothing wrong"
        made = VIDEO_FAULTS[fault](one, rng)
        videos.append(replace(made, facts=made.facts | {"fault": fault}))
    return videos


# ----------------------------------------------------------------------------------------- chains


def with_reply(one: Sample, chain: str | None, said: str = "") -> Sample:
    """The sample with a chain and an answer, which is a box around the truth if none is given."""
    answer = said or f"\\boxed{{{one.facts['answer']}}}"
    turn = Message("assistant", (answer,), think=chain)
    return replace(one, messages=(*one.messages[:-1], turn))


def good_chain(one: Sample, rng: random.Random) -> Sample:
    return with_reply(one, one.facts["chain"])


def system_prompt(one: Sample, rng: random.Random) -> Sample:
    good = good_chain(one, rng)
    system = Message("system", ("You are a careful assistant.",))
    return replace(good, messages=(system, *good.messages))


def with_words(one: Sample, before: str, after: str) -> Sample:
    """A good chain, and words around the question; the line break behind a picture stays."""
    user, answer = with_reply(one, one.facts["chain"]).messages
    *pictures, question = user.parts
    line_break = "\n" if question.startswith("\n") else ""
    said = f"{line_break}{before}{question.removeprefix(line_break)}{after}"
    return replace(one, messages=(replace(user, parts=(*pictures, said)), answer))


def asked_to_think(one: Sample, rng: random.Random) -> Sample:
    return with_words(one, "", " Please think step by step.")


def hint_in_front(one: Sample, rng: random.Random) -> Sample:
    return with_words(one, "Hint: look twice.\nQuestion: ", "")


def other_tags(one: Sample, rng: random.Random) -> Sample:
    chain = one.facts["chain"]
    answer = one.facts["answer"]
    return with_reply(
        one, None, f"<REASONING>{chain}</REASONING>\n<CONCLUSION>{answer}</CONCLUSION>"
    )


def four_hashes(one: Sample, rng: random.Random) -> Sample:
    chain = one.facts["chain"]
    answer = one.facts["answer"]
    return with_reply(one, None, f"{chain}\n#### {answer}")


def no_chain(one: Sample, rng: random.Random) -> Sample:
    return with_reply(one, None)


def question_again(one: Sample, rng: random.Random) -> Sample:
    answer = one.facts["answer"]
    return with_reply(one, f"{last_question(one)} {answer}.")


def wrong_box(one: Sample, rng: random.Random) -> Sample:
    """An answer of the same kind that is wrong, after a right chain."""
    *key, value = one.facts["answer"].split()
    values = PLACES if value in PLACES else [str(digit) for digit in range(10)]
    wrong = rng.choice([other for other in values if other != value])
    answer = " ".join([*key, wrong])
    return with_reply(one, one.facts["chain"], f"\\boxed{{{answer}}}")


def invention(one: Sample, rng: random.Random) -> Sample:
    answer = one.facts["answer"]
    return with_reply(one, f"7 northwest purple star. so {answer}.")


def loop(one: Sample, rng: random.Random) -> Sample:
    chain = one.facts["chain"] + " "
    return with_reply(one, 30 * chain + one.facts["answer"])


def essay(one: Sample, rng: random.Random) -> Sample:
    return with_reply(one, None, "I see. " * 60)


REPAIRED: dict[str, Fault] = {
    "system prompt": system_prompt,
    "request to think": asked_to_think,
    "hint in front": hint_in_front,
    "tags of another kind": other_tags,
    "`####` before the answer": four_hashes,
    "no chain": no_chain,
}
DROPPED: dict[str, Fault] = {
    "question said again": question_again,
    "wrong answer in the box": wrong_box,
    "chain that invents": invention,
    "chain that loops": loop,
    "essay for an answer": essay,
}
CHAIN_FAULTS = {"nothing wrong": good_chain} | REPAIRED | DROPPED
TWICE = "a second time"  # the fault of a sample that is there already

# Shares of faults: a twentieth of everything; and of four that are harmful, three in twenty
EACH = dict.fromkeys([*REPAIRED, *DROPPED], 0.05)
HARMFUL = dict.fromkeys([name for name in DROPPED if name != "essay for an answer"], 0.15)
DUPLICATES = 0.05


def faulty_chains(samples: int, seed: int, shares: dict[str, float]) -> list[Sample]:
    """Chains of the reasoning families with at most one fault each; and some of them twice."""
    rng = random.Random(seed)
    found = []
    for family in REASONING:
        for one in drawn_samples(family, samples // len(REASONING), seed):
            fault = drawn_fault(rng, shares) or "nothing wrong"
            made = CHAIN_FAULTS[fault](one, rng)
            found.append(replace(made, facts=made.facts | {"fault": fault}))

    # The same question about the same picture
    for one in rng.sample(found, round(DUPLICATES * len(found))):
        found.append(replace(one, facts=one.facts | {"fault": TWICE}))
    return found
