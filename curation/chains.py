"""Chains of thought by rejection sampling, and their blend with direct answers (think-fusion).

What it teaches: after RL a policy thinks well when it is asked to, and has forgotten how to answer
at once. Its own right chains, a tenth of them among direct answers, teach it both again.

    questions -> asked with thinking -> the first right answer of each -> chains.jsonl
    direct 0 1 2 3 4 5 ...  --+
    chains, shuffled anew   --+-> Blend[n]: 90 % direct, 10 % chains, at random places

    python -m curation.chains --model runs/rl --data questions.jsonl --out chains.jsonl
    torchrun --nproc-per-node 8 -m curation.chains --model ... (any number of ranks)

The file holds the questions as they were, without the request to think: whoever trains on them adds
its own (`data.encode.with_thinking`). Interrupted, the same command goes on where it was.

Source: SAIL-VL2 section 4.2.4 (900K direct answers, 100K chains from the RL policy).
"""

import functools
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Iterator, Sequence

import numpy as np

from curation.asking import (
    AskOptions,
    Record,
    Remembered,
    Reply,
    Sampling,
    ask_about_files,
    ask_all,
    open_funnel,
    sample_of,
)
from curation.rows import write_rows
from data.encode import Encoder, with_thinking
from data.readers import Folder
from data.sample import BadSample, Faults, Message, Sample
from graders import boxed, split_think
from infra.cli import command
from scale import parallel
from vlm import SailVL

# ---------------------------------------------------------------------------------------- harvest


def rejection_sample(
    model: SailVL,
    encoder: Encoder,
    samples: list[Sample],
    tries: int = 4,
    max_new: int = 64,
    temperature: float = 1.0,
    seed: int = 0,
) -> list[Sample]:
    """The samples whose question the model solves when it thinks, with the first of its right chains.

    They ask for thinking: ready to train on. The same on all ranks.
    """
    answers = Remembered()
    ask_all(model, encoder, samples, Sampling(tries, max_new, temperature, seed), answers)

    # The question with its request to think, and the model's own words after it.
    harvest = []
    for record in answers.records():
        reply = first_right(record)
        if reply is not None:
            harvest.append(asking_for_it(own_chain(samples[record.index], reply), encoder))
    return harvest


def first_right(record: Record) -> Reply | None:
    """The first reply whose one box holds the truth and whose form is whole."""
    for reply in record.replies:
        if reply.right and reply.form:
            return reply
    return None


def own_chain(sample: Sample, reply: Reply) -> Sample:
    """The sample with the model's chain and box in place of its last answer."""
    chain, answer = split_think(reply.text)
    own = Message("assistant", (f"\\boxed{{{boxed(answer)}}}",), think=chain)

    # What comes after the last answer is not asked, so it goes; the last answer, if any, is replaced.
    turns = list(sample.messages)
    while turns and turns[-1].role != "assistant":
        turns.pop()
    asked = turns[:-1] if turns else sample.messages
    return replace(
        sample,
        messages=(*asked, own),
        task="chain",
        facts=sample.facts | {"chain": chain},
    )


def asking_for_it(sample: Sample, encoder: Encoder) -> Sample:
    """The question with the request to think, before the answer that the sample has."""
    asked = with_thinking(sample, encoder.tokenizer.think_prompt)
    return replace(asked, messages=(*asked.messages[:-1], sample.messages[-1]))


def read_chains(path: Path, encoder: Encoder, faults: Faults) -> list[Sample]:
    """A harvest that the command wrote (or any rows that end with a chain), ready to train on.

    What is no chain is counted in `faults`. Raises ValueError when there is none at all.
    """
    folder = Folder(path)
    chains = []
    for index in range(len(folder)):
        sample = folder[index]
        try:
            if isinstance(sample, BadSample):
                raise sample
            if not sample.messages[-1].think:
                raise BadSample("no chain", f"{sample.origin}: it ends without <think>")
            chains.append(asking_for_it(sample, encoder))
        except BadSample as fault:
            faults.add(fault)
    faults.merge(folder.faults)  # lines that are no record
    if not chains:
        raise ValueError(f"{path}: no chain in it; `python -m curation.chains` writes some")
    return chains


# ------------------------------------------------------------------------------------------ blend

BLOCK = 1000  # numbers among which the places of the chains are drawn


class Blend:
    """A stream of direct answers with `share` of its numbers taken by chains.

    Number n is a pure function of the seed and n. In every block of 1000 numbers as many places are
    chains as the share asks, drawn at random, so that no lane (n % 8) gets more of them than
    another. How many chains come before n is therefore arithmetic, and with it which chain and
    which direct sample n is: every chain is used as often as the others, in another order each
    time, and no direct sample is left out. Ends where `direct` ends.

    direct: a stream; chains: samples that are ready to train on. Raises ValueError for a share
    outside [0, 1), and when chains are wanted and there are none.
    """

    def __init__(self, direct: Any, chains: Sequence[Sample], share: float, seed: int = 0):
        if not 0 <= share < 1:
            raise ValueError(f"a share of {share} chains: 0 <= share < 1 is wanted")
        if share > 0 and not chains:
            raise ValueError(
                "no chain survived rejection sampling; train the policy longer or ask it easier questions"
            )
        self.direct = direct
        self.chains = chains
        self.share = Fraction(str(share))
        self.seed = seed
        self.endless = direct.endless
        self.numbered = getattr(direct, "numbered", True)
        self.faults = getattr(direct, "faults", Faults())

        # What readers ask a stream about is answered by the one below, in the blend's numbers
        self.wanted = getattr(direct, "wanted", "")
        if hasattr(direct, "order"):
            self.order = BlendedOrder(self)

    def __getitem__(self, n: int) -> Any:
        """A Sample, or what `direct` has there: a BadSample, or None. Its IndexError is the end."""
        # A direct number: all numbers before n that are no chains come before it.
        count, is_chain = self.place_of(n)
        if not is_chain:
            return self.direct[n - count]

        # A chain is there only as long as there is a direct sample to come.
        if not self.endless and self.numbered:
            following = self.direct[n - count]
            if following is None:
                return None
        return self.chain(count)

    def __iter__(self) -> Iterator[Sample]:
        """The usable ones from the start; others are passed over, and counted if they are faults."""
        n = 0
        while True:
            try:
                found = self[n]
            except IndexError:
                return
            n += 1
            if isinstance(found, BadSample):
                self.faults.add(found)
            elif found is not None:
                yield found

    def place_of(self, n: int) -> tuple[int, bool]:
        """How many chains come before number n, and whether it is one."""
        # Those of whole blocks, and those of this one
        block, place = divmod(n, BLOCK)
        places = self.places(block)
        earlier = int(np.searchsorted(places, place))
        is_chain = earlier < len(places) and places[earlier] == place
        return self.chains_before(block) + earlier, bool(is_chain)

    def chains_before(self, block: int) -> int:
        """In all blocks before this one: rounded down, so that in the long run the share is exact."""
        return int(block * BLOCK * self.share)

    def places(self, block: int) -> np.ndarray:
        """The places of this block that are chains, rising."""
        number = self.chains_before(block + 1) - self.chains_before(block)
        return chain_places(self.seed, block, number)

    def chain(self, count: int) -> Sample:
        """The chain that comes after `count` others: all of them once, then all again in another order."""
        # The order of an epoch is drawn from its number.
        epoch, place = divmod(count, len(self.chains))
        order = epoch_order(self.seed, epoch, len(self.chains))
        return self.chains[int(order[place])]


class BlendedOrder:
    """The order of the direct stream under the blend's numbers: a chain has the record that comes next."""

    def __init__(self, blend: Blend):
        self.blend = blend
        self.groups = blend.direct.order.groups
        self.drawable = blend.direct.order.drawable

    def __getitem__(self, n: int) -> tuple[int, int] | None:
        count, _ = self.blend.place_of(n)
        return self.blend.direct.order[n - count]


@functools.lru_cache(16)
def chain_places(seed: int, block: int, number: int) -> np.ndarray:
    drawn = np.random.default_rng([seed, 0, block]).permutation(BLOCK)[:number]
    return np.sort(drawn)


@functools.lru_cache(4)
def epoch_order(seed: int, epoch: int, number: int) -> np.ndarray:
    return np.random.default_rng([seed, 1, epoch]).permutation(number)


# ---------------------------------------------------------------------------------------- command


@dataclass
class HarvestOptions(AskOptions):
    """Ask a model every question several times, and keep its first right chain of each."""


def harvest_chains(options: HarvestOptions) -> None:
    # All ranks ask, one writes.
    records, answers, ranks = ask_about_files(options)
    if ranks.main:
        write_chains(options, records, answers)
    parallel.stop()


def write_chains(options: HarvestOptions, records, answers) -> None:
    """The solved questions with their chains as a file, and the funnel."""
    funnel = open_funnel(records)
    rows: list[tuple[Sample, dict]] = []
    for record in funnel.asked(answers.records()):
        reply = first_right(record)
        if reply is None:
            continue
        try:
            sample = sample_of(record, records)
        except BadSample as fault:
            funnel.faults.add(fault)
            continue

        # With the pass rate: who wants hard chains only can choose by it.
        measured = {"pass_rate": record.pass_rate, "tries": options.sampling.tries}
        rows.append((own_chain(sample, reply), measured))

    funnel.count("kept", len(rows))
    if rows:
        funnel.count("written", write_rows(options.out, rows, funnel.faults))
    print(funnel.report())
    if not rows:
        raise ValueError(
            f"{options.out} not written: no question was solved; train the policy longer or ask it "
            "easier questions"
        )
    print(f"wrote {options.out}")


if __name__ == "__main__":
    command(harvest_chains)
