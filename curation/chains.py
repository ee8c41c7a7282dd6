"""Chains of thought by rejection sampling, and their blend with direct answers (think-fusion).

Source: SAIL-VL2 section 4.2.4.
"""

import itertools
import random
from dataclasses import replace
from typing import Iterator

from curation.difficulty import thought
from data.encode import Encoder
from data.sample import Message, Sample
from evaluate import text_of
from graders import boxed, split_think
from rewards import answer_reward, format_reward
from vlm import SailVL


def rejection_sample(
    model: SailVL,
    encoder: Encoder,
    samples: list[Sample],
    tries: int = 4,
    max_new: int = 64,
    temperature: float = 1.0,
    seed: int = 0,
) -> list[Sample]:
    """The samples whose question the model solves when it thinks, answered by the first of its own right chains.

    Right means: the one box holds the truth, the format is whole, and the model stopped by itself.
    """
    asked, answers = thought(model, encoder, samples, tries, max_new, temperature, seed)
    kept: dict[int, Sample] = {}
    for a in answers:
        text, s = text_of(a, encoder.tokenizer), asked[a.prompt]
        if (
            a.prompt not in kept
            and answer_reward(text, s.facts["answer"], a.finished)
            and format_reward(text, a.finished)
        ):
            chain, answer = split_think(text)
            own = Message("assistant", (f"\\boxed{{{boxed(answer)}}}",), think=chain)
            kept[a.prompt] = replace(s, messages=(*s.messages[:-1], own), task="chain")
    return [kept[i] for i in sorted(kept)]


def blend(
    direct: Iterator[Sample], chains: list[Sample], share: float, seed: int = 0
) -> Iterator[Sample]:
    """An endless stream with `share` of its samples from `chains` (each as often as the others), the rest direct.

    Raises ValueError when chains are wanted and there are none: the policy solved nothing, so there is nothing to fuse.
    """
    if share > 0 and not chains:
        raise ValueError(
            "no chain survived rejection sampling; train the policy longer or ask it easier questions"
        )
    rng, pool = (
        random.Random(seed),
        itertools.chain.from_iterable(
            rng_order(chains, seed + epoch) for epoch in itertools.count()
        ),
    )
    for sample in direct:
        yield next(pool) if rng.random() < share else sample


def rng_order(samples: list[Sample], seed: int) -> list[Sample]:
    return random.Random(seed).sample(samples, len(samples))


class Blend:
    endless = True

    def __init__(self, direct, chains, share, seed):
        self.it = blend(direct, chains, share, seed)

    def __iter__(self):
        return self.it
