"""Making datasets out of datasets: plain functions from samples to samples.

What it teaches: much of a recipe is choosing what to train on next with the model that one has. RL learns from questions
that the policy solves sometimes: `solved` measures that, and the filters keep what still teaches.

    questions -> free_response -> solved (pass@4) -> by_difficulty -> verifiable RL
    questions -> solved by the RL policy -> hard -> mixed RL;  -> rejection_sample -> blend -> think-fusion

Sources: SAIL-VL2 section 4.2.3 (pass@4 with the previous model; multiple choice becomes free response), 4.2.4 (think-fusion
data: 90 % direct, 10 % chains by rejection sampling from the RL policy), 4.2.5 (hard, "suboptimal" questions for mixed RL).
"""

import re
from dataclasses import replace

from data.encode import Encoder, with_thinking
from data.sample import Sample
from evaluate import text_of
from generate import Answer, generate
from rewards import answer_reward
from vlm import SailVL


def thought(
    model: SailVL,
    encoder: Encoder,
    samples: list[Sample],
    tries: int,
    max_new: int,
    temperature: float,
    seed: int,
) -> tuple[list[Sample], list[Answer]]:
    """The samples asked with thinking, and `tries` answers to each, in order."""
    asked = [with_thinking(s, encoder.tokenizer.think_prompt) for s in samples]
    return asked, generate(
        model,
        [encoder.prompt(s) for s in asked],
        encoder.tokenizer.end,
        max_new,
        tries,
        temperature,
        seed=seed,
    )


def solved(
    model: SailVL,
    encoder: Encoder,
    samples: list[Sample],
    tries: int = 4,
    max_new: int = 64,
    temperature: float = 1.0,
    seed: int = 0,
) -> list[float]:
    """Share of `tries` sampled chains that answer each question rightly: pass@4 as the paper's filter must mean it, since
    it keeps what lies strictly between 0 and 1 (inferred)."""
    asked, answers = thought(model, encoder, samples, tries, max_new, temperature, seed)
    right = [0.0] * len(samples)
    for a in answers:
        right[a.prompt] += (
            answer_reward(
                text_of(a, encoder.tokenizer), asked[a.prompt].facts["answer"], a.finished
            )
            / tries
        )
    return right


def by_difficulty(samples: list[Sample], rates: list[float], reasoning: set[str]) -> list[Sample]:
    """What can still teach: reasoning questions (by family) that are solved sometimes, others that are not always solved.
    An impossible reasoning question gives groups without a lesson; an impossible look-up may only be unfamiliar."""
    return [
        s
        for s, r in zip(samples, rates, strict=True)
        if r < 1 and (r > 0 or s.facts.get("family", s.task) not in reasoning)
    ]


def hard(samples: list[Sample], rates: list[float], most: float = 0.5) -> list[Sample]:
    """For the mixed stage: solved sometimes, but at most `most` of the time (our choice of "suboptimal"), hardest first."""
    ranked = sorted((i for i, r in enumerate(rates) if 0 < r <= most), key=lambda i: rates[i])
    return [samples[i] for i in ranked]


OPTION = re.compile(r"^\s*\(?([A-Z])[).:]\s*(.+?)\s*$", re.MULTILINE)


def free_response(samples: list[Sample]) -> tuple[list[Sample], list[Sample]]:
    """(converted or already free, left as they are): multiple choice loses its options, its letter becomes the option's text.

    A letter can be guessed one time in four, so its reward is mostly luck. The paper converts numeric and symbolic choices with
    a language model; these rules do the same where the options stand on lines of their own. A question that makes no sense
    without them ("which of the following ...") or whose answer is no option is not converted.
    """
    done, left = [], []
    for s in samples:
        *history, user, answer = s.messages
        text, truth = user.parts[-1], s.facts["answer"].strip()
        options = dict(OPTION.findall(text)) if isinstance(text, str) else {}
        letter = re.fullmatch(r"\(?([A-Z])[).:]?", truth)
        if len(options) < 2:
            done.append(s)
        elif (
            not letter
            or letter[1] not in options
            or re.search(r"\b(which|these|following|option|above)\b", OPTION.sub("", text), re.I)
        ):
            left.append(s)
        else:
            told = options[letter[1]]
            asked = replace(user, parts=(*user.parts[:-1], OPTION.sub("", text).rstrip()))
            done.append(
                replace(
                    s,
                    messages=(*history, asked, replace(answer, parts=(told,))),
                    facts=s.facts | {"answer": told},
                )
            )
    return done, left
