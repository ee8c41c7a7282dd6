"""Judges of captions: is enough said, and is it true? From scores to a filter, and how good that is.

What it teaches: nobody can ask a large model about 300 million captions, but somebody can ask it about
three million, teach a small model to answer like it, and ask that. Two things are scored from 1 to 5,
visual information richness (vir) and image-text alignment (ita), by two kinds of judges each:

    Score Judge       "how right? CAPTION" -> 4          below 3: dropped
    Yes-or-No Judge   "is it right? CAPTION" -> yes      no: dropped

    captions --annotate--> scored --uniform--> as many of each score, as questions --sft.py--> judges
    captions ------------------------------filter----------------------------------judges--> kept
    captions of known scores --------------measure---------------------------------judges--> a table

    python -m curation.judges annotate --data captions.jsonl --out scored.jsonl --annotator.url ...
    python -m curation.judges uniform  --data scored.jsonl --out ita.jsonl --dimension ita --train score
    python sft.py sft1 --data ita.jsonl --model runs/toy/soup --out runs/judge
    python -m curation.judges filter   --data captions.jsonl --out kept.jsonl --annotator.model runs/judge
    python -m curation.judges measure  --data noisy.jsonl --out table.jsonl --annotator.model runs/judge

What is asked stands in curation/prompts/{vir,ita,vir_yesno,ita_yesno}.txt; the toy, whose tokenizer knows
few words, is asked what stands in curation/prompts/toy (--annotator.prompts curation/prompts/toy).

Sources: SAIL-VL2 section 3.1: both dimensions and what they look at, about 3M captions scored, 500K of them
uniform over scores, both kinds of judges, the rule of the filter (300M became 250M), and Table 2.

Not published: the prompts, and what Table 2 counts as positive. Here it is the caption that is to be
dropped: a judge that finds a share R of the positives with a precision of P shows that they are at most
P / R of the test. Table 2's zero-shot rows have .436 / .994 and .430 / .999, so at most 43 % of its captions
are positive. Captions to be kept would be 60 % of a set uniform over scores, and over 80 % of the raw one;
captions to be dropped are 40 % of the uniform one. The table here has the captions to be kept beside them.
Our choice as well: a reply that nobody can read drops its caption.
"""

import json
import random
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Callable, Iterator, Literal, Sequence

from tyro.conf import subcommand

from curation.annotators import AnnotatorOptions, as_question, open_annotator
from curation.pipeline import Item, PipelineOptions, run_pipeline, write_lines
from curation.questions import AskStep
from curation.requests import Annotator, Prompts, Request, Response, json_in, why_unanswered
from data.readers import Folder
from data.sample import BadSample, Message, Sample
from graders import split_think, yes_or_no
from infra.cli import command
from infra.table import markdown
from scale import parallel

DIMENSIONS = ("vir", "ita")
QUESTIONS = ("vir", "ita", "vir_yesno", "ita_yesno")
LOWEST = 3  # the score that is kept (SAIL-VL2, section 3.1)
HIGHEST = 5


def dimension_of(question: str) -> str:
    """What a question is about: vir_yesno -> vir."""
    return question.removesuffix("_yesno")


def check_questions(questions: Sequence[str]) -> None:
    """Raises ValueError for one that no judge is asked."""
    unknown = sorted(set(questions) - set(QUESTIONS))
    if unknown or not questions:
        named = f" {unknown[0]}" if unknown else ""
        raise ValueError(f"no question{named}: choose from {', '.join(QUESTIONS)}")


# ---------------------------------------------------------------------------------------- asking


def caption_request(question: str, sample: Sample) -> Request:
    """What a judge is asked about the last answer of a sample, which is a caption of its pictures.

    Raises BadSample when there is none.
    """
    last = sample.messages[-1]
    if last.role != "assistant":
        raise BadSample("no caption", f"{sample.origin}: it does not end with an answer")
    caption = "".join(part for part in last.parts if isinstance(part, str)).strip()
    pictures = []
    for message in sample.messages:
        pictures += [part for part in message.parts if not isinstance(part, str)]
    return Request(question, {"caption": caption}, tuple(pictures), sample)


def score_in(reply: str) -> int | None:
    """1 to 5, as JSON with a `score` or as a number that stands alone; None for anything else."""
    found = json_in(reply)
    if isinstance(found, dict):
        found = found.get("score")
        whole = (
            isinstance(found, (int, float)) and not isinstance(found, bool) and found == found // 1
        )
        return int(found) if whole and 1 <= found <= HIGHEST else None
    alone = re.fullmatch(
        r"\W*(?:score\W*)?([1-5])(?:\s*(?:/|out of)\s*5)?\W*", reply, re.IGNORECASE
    )
    return int(alone[1]) if alone else None


def yes_or_no_in(reply: str) -> str | None:
    """yes or no, as JSON with an `answer` or in words; None for neither."""
    found = json_in(reply)
    if isinstance(found, dict):
        reply = str(found.get("answer", ""))
    return yes_or_no(reply)


def read_reply(question: str, response: Response) -> int | str | None:
    """What a reply says: a score, yes or no, or None for one that cannot be read."""
    if response.text is None:
        return None
    _, answer = split_think(response.text)
    read = yes_or_no_in if question.endswith("_yesno") else score_in
    return read(answer)


def is_low(said: int | str | None) -> bool:
    """Whether a caption is dropped for this: a score below 3, a no, or nothing that can be read."""
    if isinstance(said, int):
        return said < LOWEST
    return said != "yes"


class Judging(AskStep):
    """A step that asks a judge about every caption.

    outcome: marks an item by what was said of it: (item, question, what was read, response).
    """

    def __init__(
        self,
        question: str,
        annotator: Annotator,
        outcome: Callable[[Item, str, int | str | None, Response], None],
    ):
        super().__init__(annotator)
        self.name = question
        self.outcome = outcome

    def request(self, item: Item) -> Request:
        return caption_request(self.name, item.sample)

    def mark(self, item: Item, response: Response) -> None:
        self.outcome(item, self.name, read_reply(self.name, response), response)


def note(item: Item, question: str, said: int | str | None, response: Response) -> None:
    """annotate: the score becomes a fact; a reply that cannot be read drops the caption."""
    if said is None:
        item.drop(question, reason_of_no_reply(response))
    else:
        item.keep(question, str(said), **{question: said})


def drop_low(item: Item, question: str, said: int | str | None, response: Response) -> None:
    """filter: below 3, or a no."""
    if said is None:
        item.drop(question, reason_of_no_reply(response))
    elif is_low(said):
        reason = f"{question} below {LOWEST}" if isinstance(said, int) else f"{question} no"
        item.drop(question, f"{reason}: {said}")
    else:
        item.keep(question, str(said), **{f"judge_{question}": said})


def remember(item: Item, question: str, said: int | str | None, response: Response) -> None:
    """measure: nobody is dropped, not even for a reply that cannot be read; what a server did not
    answer is no judgement, and the next run asks again."""
    if response.lost:
        item.drop(question, response.fault)
    else:
        item.keep(question, str(said), **{f"judge_{question}": said})


def reason_of_no_reply(response: Response) -> str:
    """Why a reply is none, with its class first."""
    if response.text is None:
        return why_unanswered(response)
    return f"unreadable reply: {response.text[:100]}"


class Repeated:
    """A step over the whole set: a caption that more than `most` pictures have describes none of them."""

    name = "repeated"

    def __init__(self, most: int):
        self.most = most

    def __call__(self, items: list[Item]) -> None:
        said = [caption_request("ita", item.sample).fields["caption"] for item in items]
        times = Counter(said)
        for item, caption in zip(items, said):
            if times[caption] > self.most:
                item.drop(self.name, f"repeated: {times[caption]} times")
            else:
                item.keep(self.name, f"{times[caption]} times")


# -------------------------------------------------------------------------------------- resampling


class Uniform:
    """A step over the whole set: as many captions of every score, at most `size` in all (0: no limit)."""

    def __init__(self, dimension: str, size: int = 0, seed: int = 0):
        self.name = f"uniform over {dimension}"
        self.dimension = dimension
        self.size = size
        self.seed = seed

    def __call__(self, items: list[Item]) -> None:
        # By score; the rarest decides how many of each
        by_score: dict[int, list[Item]] = defaultdict(list)
        for item in items:
            by_score[self.score(item)].append(item)
        unscored = by_score.pop(0, [])
        each = min(map(len, by_score.values()), default=0)
        if self.size:
            each = min(each, self.size // max(1, len(by_score)))

        # Drawn without replacement
        chosen: set[int] = set()
        for score in sorted(by_score):
            drawn = random.Random(f"{self.seed}/{score}").sample(by_score[score], each)
            chosen |= {item.index for item in drawn}
        for item in unscored:
            item.drop(self.name, f"no score: facts hold no {self.dimension} from 1 to {HIGHEST}")
        for score in sorted(by_score):
            self.mark(by_score[score], chosen, score)

    def score(self, item: Item) -> int:
        """0 for none."""
        found = item.sample.facts.get(self.dimension)
        return found if found in range(1, HIGHEST + 1) else 0

    def mark(self, items: list[Item], chosen: set[int], score: int) -> None:
        for item in items:
            if item.index in chosen:
                item.keep(self.name, f"score {score}")
            else:
                item.drop(self.name, f"enough of score {score}")


class AsJudgement:
    """A step that makes a scored caption the question that a judge is asked, with its answer.

    chain: the fact that the judge shall say before it, "" for none.
    """

    def __init__(self, question: str, prompts: Prompts, chain: str = ""):
        self.name = f"as a question: {question}"
        self.question = question
        self.prompts = prompts
        self.chain = chain

    def __call__(self, items: list[Item]) -> None:
        for item in items:
            chain = item.sample.facts.get(self.chain) if self.chain else None
            if self.chain and not chain:
                item.drop(self.name, f"no chain: facts hold no {self.chain}")
                continue
            asked = judgement(self.question, item.sample, self.prompts, chain)
            item.change(self.name, asked)


def judgement(question: str, sample: Sample, prompts: Prompts, chain: str | None = None) -> Sample:
    """A training row: the request exactly as a judge of our own will see it, and what it shall say."""
    score = sample.facts[dimension_of(question)]
    answer = str(score)
    if question.endswith("_yesno"):
        answer = "no" if is_low(score) else "yes"
    asked = as_question(caption_request(question, sample), prompts)
    return replace(
        sample,
        messages=(*asked.messages, Message("assistant", (answer,), chain)),
        task=question,
        facts=sample.facts | {"answer": answer, "family": question},
    )


# ------------------------------------------------------------------------------------------ measuring


@dataclass
class Tally:
    """How often a judge was right, the captions to be dropped being the positive ones."""

    found: int = 0  # dropped, and rightly
    missed: int = 0  # kept, and should not have been
    lost: int = 0  # dropped, and should not have been
    kept: int = 0  # kept, and rightly
    unread: int = 0  # replies that cannot be read, which drop their caption

    def add(self, said: int | str | None, score: int) -> None:
        """What a judge said of a caption of this true score."""
        self.unread += said is None
        if score < LOWEST:
            self.found += is_low(said)
            self.missed += not is_low(said)
        else:
            self.lost += is_low(said)
            self.kept += not is_low(said)

    @property
    def captions(self) -> int:
        return self.found + self.missed + self.lost + self.kept

    @property
    def dropping(self) -> tuple[float, float]:
        """Precision and recall of what is dropped."""
        return share(self.found, self.lost), share(self.found, self.missed)

    @property
    def keeping(self) -> tuple[float, float]:
        """Precision and recall of what is kept."""
        return share(self.kept, self.missed), share(self.kept, self.lost)


def share(part: int, rest: int) -> float:
    """nan when there is nothing to take a share of."""
    return part / (part + rest) if part + rest else float("nan")


def tallies(samples: Sequence[Sample], question: str) -> dict[str, Tally]:
    """Of all captions (""), and of each kind of noise that facts name.

    What could not be read is no fact of a row that was written.
    """
    of_kind: dict[str, Tally] = defaultdict(Tally)
    for sample in samples:
        score = sample.facts[dimension_of(question)]
        for kind in ("", sample.facts.get("noise", "unnamed")):
            of_kind[kind].add(sample.facts.get(f"judge_{question}"), score)
    return dict(of_kind)


def table_of(measured: dict[str, dict[str, Tally]]) -> str:
    """Table 2's form as Markdown, then what became of each kind of noise."""
    shares = ("precision", "recall", "of the kept: precision", "recall")
    judges = [["judge", *shares, "unreadable", "captions"]]
    for question, of_kind in measured.items():
        tally = of_kind[""]
        cells = [f"{value:.3f}" for value in (*tally.dropping, *tally.keeping)]
        unread = f"{tally.unread / tally.captions:.1%}"
        judges.append([question, *cells, unread, f"{tally.captions:,}"])

    # A kind without captions of one sort has no share of it
    kinds = [["judge", "noise", "to be dropped", "found", "to be kept", "lost"]]
    for question, of_kind in measured.items():
        for kind in sorted(of_kind.keys() - {""}):
            kinds.append([question, kind, *kind_cells(of_kind[kind])])
    return "\n".join([*markdown(*judges), "", *markdown(*kinds)])


def kind_cells(tally: Tally) -> list[str]:
    cells = []
    for right, wrong, shown in (
        (tally.found, tally.missed, tally.found),
        (tally.kept, tally.lost, tally.lost),
    ):
        count = right + wrong
        cells += [f"{count:,}", f"{shown / count:.1%}" if count else ""]
    return cells


class HasTruth:
    """A step that drops captions of which nobody said what they should score."""

    name = "has truth"

    def __init__(self, questions: Sequence[str]):
        self.dimensions = sorted({dimension_of(question) for question in questions})

    def __call__(self, items: list[Item]) -> None:
        for item in items:
            missing = [name for name in self.dimensions if not self.known(item, name)]
            if missing:
                item.drop(self.name, f"no truth: facts hold no {missing[0]} from 1 to {HIGHEST}")
            else:
                item.keep(self.name)

    def known(self, item: Item, dimension: str) -> bool:
        return item.sample.facts.get(dimension) in range(1, HIGHEST + 1)


# ---------------------------------------------------------------------------------------- commands


@dataclass
class JudgesOptions(PipelineOptions):
    """What a command that asks judges wants to know."""

    annotator: AnnotatorOptions = field(default_factory=AnnotatorOptions)
    ask: tuple[str, ...] = QUESTIONS  # vir, ita: a score; vir_yesno, ita_yesno: yes or no
    # Judges of their own, in the annotator's place: question and directory of weights, `ita runs/ita`
    judges: dict[str, Path] = field(default_factory=dict)


def judging_steps(options: JudgesOptions, mark: Callable) -> list[Judging]:
    """A step for each question. Raises ValueError for an unknown one, and when nobody would answer."""
    check_questions((*options.ask, *options.judges))

    # The same judge is opened once
    opened: dict[Path | None, Annotator] = {}
    steps = []
    for question in options.ask:
        directory = options.judges.get(question)
        if directory not in opened:
            own = replace(options.annotator, model=directory, url="", oracle=False)
            opened[directory] = open_annotator(
                own if directory else options.annotator, options.seed
            )
        steps.append(Judging(question, opened[directory], mark))
    return steps


def finished(steps: Sequence[Judging], options: PipelineOptions, report: str) -> None:
    """The end of a run, said by one rank."""
    if parallel.place()[0] == 0:
        print(report)
        for annotator in {id(step.annotator): step.annotator for step in steps}.values():
            print(annotator.report())
        print(f"wrote {options.out}")
    parallel.stop()


@dataclass
class AnnotateOptions(JudgesOptions):
    """Let an annotator score captions; the scores become facts of the rows."""

    ask: tuple[str, ...] = DIMENSIONS  # vir, ita, vir_yesno, ita_yesno


def annotate_captions(options: AnnotateOptions) -> None:
    steps = judging_steps(options, note)
    outcome = run_pipeline(options, steps)
    finished(steps, options, outcome.report())


@dataclass
class FilterOptions(JudgesOptions):
    """Drop captions that score below 3, or that a judge says no to, in either dimension."""

    repeated: int = 0  # drop captions that more pictures than this have, too; 0: however many


def filter_captions(options: FilterOptions) -> None:
    # Without judges, if repetition is all that counts
    asked = options.ask or not options.repeated
    steps = judging_steps(options, drop_low) if asked else []
    over_all = [Repeated(options.repeated)] if options.repeated else []
    outcome = run_pipeline(options, steps, over_all)
    finished(steps, options, outcome.report())


@dataclass
class UniformOptions(PipelineOptions):
    """As many captions of every score: as they are, or as the questions that a judge is trained on."""

    dimension: Literal["vir", "ita"] = "ita"
    train: Literal["", "score", "yesno"] = ""  # as questions of this kind of judge; "": as captions
    size: int = 0  # captions in all; 0: as many as the rarest score allows
    prompts: Path | None = None  # a folder of prompts that come before ours
    chain: str = ""  # a fact that the judge shall say before its answer, as <think>...</think>


def uniform_captions(options: UniformOptions) -> None:
    if (options.chain or options.prompts) and not options.train:
        raise ValueError("--chain and --prompts are of a judge's lessons: give --train with them")
    over_all: list = [Uniform(options.dimension, options.size, options.seed)]
    if options.train:
        suffix = "_yesno" if options.train == "yesno" else ""
        over_all.append(
            AsJudgement(options.dimension + suffix, Prompts(options.prompts), options.chain)
        )
    outcome = run_pipeline(options, [], over_all)
    finished([], options, outcome.report())


@dataclass
class MeasureOptions(JudgesOptions):
    """Precision and recall of judges on captions whose scores are known (facts vir and ita)."""


def measure_judges(options: MeasureOptions) -> None:
    steps = judging_steps(options, remember)
    outcome = run_pipeline(options, [HasTruth(options.ask), *steps])

    # Read back what was said, and write the table
    if parallel.place()[0] == 0:
        samples = list(read_whole(options.out))
        measured = {question: tallies(samples, question) for question in options.ask}
        numbers = {
            question: {kind or "all": vars(tally) for kind, tally in of_kind.items()}
            for question, of_kind in measured.items()
        }
        write_lines(options.out.with_suffix(".table.json"), [json.dumps(numbers, indent=1)])
        print(table_of(measured))
    finished(steps, options, outcome.report())


def read_whole(path: Path) -> Iterator[Sample]:
    """All samples of a file that we wrote ourselves."""
    folder = Folder(path)
    for index in range(len(folder)):
        sample = folder[index]
        if isinstance(sample, BadSample):
            raise sample
        yield sample


def judge_captions(
    options: Annotated[AnnotateOptions, subcommand("annotate")]
    | Annotated[UniformOptions, subcommand("uniform")]
    | Annotated[FilterOptions, subcommand("filter")]
    | Annotated[MeasureOptions, subcommand("measure")],
) -> None:
    """One of the four commands."""
    if isinstance(options, AnnotateOptions):
        annotate_captions(options)
    elif isinstance(options, UniformOptions):
        uniform_captions(options)
    elif isinstance(options, FilterOptions):
        filter_captions(options)
    else:
        measure_judges(options)


if __name__ == "__main__":
    command(judge_captions)
