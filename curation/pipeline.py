"""A pipeline: samples walk through steps, and each step says what it did to which, and why.

What it teaches: "300M captions became 250M" is only believed of somebody who can show, for any one of
the fifty million, which step dropped it and for what reason. So a step never returns a smaller list; it
marks. What was kept, changed or dropped is written down for each sample (its history), the funnel is
counted from the histories, and a page shows some of each with their pictures.

    records --chunk 0, 1, 2 ...--> rank chunk % ranks --> step, step, step --> one line a record in OUT.work/
                                                                                  |  all ranks are done
    OUT.jsonl  rows for the ordinary readers   <--- steps over the whole set <----+
    OUT.history.jsonl, OUT.funnel.json              (duplicates, balance)

A step over a chunk sees its samples alone, so that a chunk's outcome depends on nothing else: ranks share
chunks, and a run that was killed goes on with the chunks that are missing; finished, its files are the
ones of a run that was never stopped. A chunk in which a server did not answer is missing, too: the same
command, given once more, asks what has no reply yet, and nothing else (OUT.replies.jsonl has the others).
A step over the whole set (no two alike, uniform over classes) runs at the end, once.

Source: the funnels are SAIL-VL2's (section 3.1: 300M to 250M captions; 4.1: 6.23M to 5.1M videos);
how to keep books on them is ours.
Simplified: a step over the whole set has the text of all rows in memory.
"""

import json
import os
from collections import Counter
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Iterator, Protocol, Sequence

from tqdm import tqdm

from curation.asking import AnswerFiles, Records
from curation.requests import NO_REPLY
from curation.rows import RowWriter, as_json, hashed
from data.container_base import strict_json
from data.formats import to_sample
from data.mixture import Dataset
from data.readers import Folder
from data.sample import BadSample, Sample
from evaluate import weights_digest
from generate import weights_place
from infra.text import printable
from scale import parallel

# ------------------------------------------------------------------------------------ what walks


@dataclass(frozen=True)
class Event:
    """What a step did with a sample. did: kept, changed or dropped. why: the numbers that decided."""

    step: str
    did: str
    why: str = ""


@dataclass
class Item:
    """A sample on its way. sample: None once it cannot be read. A dropped item meets no later step."""

    index: int
    origin: str
    sample: Sample | None
    history: list[Event] = field(default_factory=list)

    @property
    def alive(self) -> bool:
        return not self.history or self.history[-1].did != "dropped"

    def keep(self, step: str, why: str = "", **measured: Any) -> None:
        """It stays as it is; what was measured goes into its facts."""
        self.sample = replace(self.sample, facts=self.sample.facts | measured)
        self.history.append(Event(step, "kept", why))

    def change(self, step: str, sample: Sample, why: str = "", **measured: Any) -> None:
        """It becomes another sample."""
        self.sample = replace(sample, facts=sample.facts | measured)
        self.history.append(Event(step, "changed", why))

    def drop(self, step: str, why: str) -> None:
        """It goes no further. `why` begins with a short class to count by, then ": " and the details."""
        self.history.append(Event(step, "dropped", why))


class PipelineStep(Protocol):
    """name: as histories and funnels have it. Called with the living items of a chunk (or, at the end,
    of the whole set); it marks each of them once."""

    name: str

    def __call__(self, items: list[Item]) -> None: ...


# -------------------------------------------------------------------------------------- on disk


@dataclass(frozen=True)
class Passed:
    """A record that went through the steps over chunks. row: as `RowWriter.row` has it, None if dropped."""

    index: int
    origin: str
    history: list[Event]
    row: dict | None

    @property
    def unanswered(self) -> bool:
        """Whether it was dropped because a server did not answer, which may be otherwise next time."""
        last = self.history[-1] if self.history else None
        return last is not None and last.did == "dropped" and last.why.startswith(NO_REPLY)


def passed_line(passed: Passed) -> dict:
    """As JSON; the inverse of `passed_of`."""
    history = [[event.step, event.did, event.why] for event in passed.history]
    return {
        "index": passed.index,
        "origin": passed.origin,
        "history": history,
        "row": passed.row,
    }


def passed_of(line: dict) -> Passed:
    history = [Event(*event) for event in line["history"]]
    return Passed(line["index"], line["origin"], history, line["row"])


@dataclass
class PipelineOptions:
    """What every pipeline wants to know."""

    data: Path  # JSON, JSONL, TSV, tar, parquet, a folder of them, or a mixture file
    out: Path  # JSONL, in our own format
    images: Path | None = None  # folder of the images; default: beside the data
    limit: int = 0  # records of the data; 0: all
    # records that walk together: many times --annotator.at-once, or the last ones keep the others waiting
    chunk: int = 256
    seed: int = 0  # of whatever is drawn

    def __post_init__(self):
        # What a server said is kept beside the output, unless somebody wants it elsewhere
        annotator = getattr(self, "annotator", None)
        if annotator is not None and annotator.cache is None:
            self.annotator = replace(annotator, cache=self.out.with_suffix(".replies.jsonl"))


OF_DATA = ("data", "images")  # shards have versions of their own
# These decide how fast, where and for whose money, not what.
NO_OUTCOME = (
    "out",
    "url",
    "key_name",
    "device",
    "at_once",
    "per_minute",
    "timeout",
    "retries",
    "cache",
    "batch",
    "price_in",
    "price_out",
    "sheet",
)


def run_pipeline(
    options: PipelineOptions,
    steps: Sequence[PipelineStep],
    over_all: Sequence[PipelineStep] = (),
    records: Sequence | None = None,
) -> "FunnelCounts":
    """From files to files. Returns, on every rank, the funnel of the whole run.

    records: in place of those of --data; as `Records`, with their `versions` and
    `refused`, which may be empty.

    Raises ValueError when --out is no .jsonl or lies in the data, when OUT.work holds another run or is
    another process's, or when nothing is left (its history and funnel are written then, too).
    """
    # What can be wrong is found before the first step
    parallel.start()
    refuse_places(options)
    if records is None:
        records = Records(Folder(options.data, options.images), options.limit)
    ledger = AnswerFiles(
        options.out.with_suffix(".work"),
        settings_of_pipeline(options, records, [*steps, *over_all]),
        passed_line,
        passed_of,
        option="--out",
    )

    # All ranks walk; one writes, all know what came of it
    with closing(ledger):
        walk_missing(options, ledger, records, steps)
        rank, _ = parallel.place()
        outcomes = [finish_pipeline(options, ledger, records, over_all)] if rank == 0 else []
        outcome = parallel.gather(outcomes)[0]
    if not outcome.written:
        raise ValueError(f"{options.out} not written: nothing is left\n{outcome.report()}")
    return outcome


def refuse_places(options: PipelineOptions) -> None:
    """Raises ValueError for an output that is no JSONL, or that the next call would read as data."""
    if options.out.suffix != ".jsonl":
        raise ValueError(f"--out {options.out}: a JSONL file is written, call it .jsonl")
    if options.chunk < 1:
        raise ValueError("--chunk must be positive")
    if options.limit < 0:
        raise ValueError("--limit must not be negative; 0 is all")
    if options.data and options.out.resolve().is_relative_to(options.data.resolve()):
        raise ValueError(f"--out {options.out} would be part of --data {options.data}: move it out")


def walk_missing(
    options: PipelineOptions, ledger: AnswerFiles, records: Records, steps: Sequence[PipelineStep]
) -> None:
    """The chunks that have no outcome yet. On return they have one, on all ranks."""
    # The same on all ranks; of them this rank's
    rank, size = parallel.place()
    done = {passed.index for passed in ledger.stored() if not passed.unanswered}
    known = set(parallel.gather(sorted(done)))
    missing = []
    for first in range(0, len(records), options.chunk):
        chunk = range(first, min(first + options.chunk, len(records)))
        if not known.issuperset(chunk):
            missing.append(chunk)

    # A chunk is written when all of it is through
    writer = RowWriter(options.out)
    writer.folder.mkdir(parents=True, exist_ok=True)
    for chunk in tqdm(missing[rank::size], desc="chunks", disable=rank > 0):
        ledger.add(walk(records, chunk, steps, writer))

    # Nobody goes on before all are done
    parallel.gather([])


def walk(
    records: Records, chunk: range, steps: Sequence[PipelineStep], writer: RowWriter
) -> list[Passed]:
    """A chunk through its steps."""
    # What can be read; a fault's words begin with its place
    items = []
    for index in chunk:
        found = records[index]
        if isinstance(found, BadSample):
            origin = found.args[1].split(": ")[0]
            items.append(Item(index, origin, None, [Event("read", "dropped", str(found))]))
        else:
            items.append(Item(index, found.origin, found))

    # Step by step; whoever was dropped meets no other
    for step in steps:
        alive = [item for item in items if item.alive]
        step(alive)
        assert_marked(step, alive)

    # Rows of the survivors, with their pictures beside the file
    return [passed_item(item, writer) for item in items]


def assert_marked(step: PipelineStep, items: list[Item]) -> None:
    """Every step says something about every sample that it met."""
    for item in items:
        marked = item.history and item.history[-1].step == step.name
        assert marked, f"step {step.name} said nothing about {item.origin}"


def passed_item(item: Item, writer: RowWriter) -> Passed:
    """What became of an item. A row that no reader would take is a drop as well."""
    row = None
    if item.alive:
        try:
            row = readable_row(item.sample, writer)
        except BadSample as fault:
            item.drop("write", str(fault))
    return Passed(item.index, item.origin, item.history, row)


def readable_row(sample: Sample, writer: RowWriter) -> dict:
    """A sample as a row, its pictures beside the file. Raises BadSample for one that cannot be read back."""
    row = writer.row(sample) | {"facts": sample.facts}
    try:
        row = strict_json(json.dumps(row, default=as_json))
        to_sample(row, sample.origin, writer.folder, Dataset(data=""))
    except BadSample as fault:
        raise fault.at(sample.origin) from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise BadSample.because(error, "unreadable row", sample.origin) from error
    return row


def settings_of_pipeline(
    options: PipelineOptions, records: Records, steps: Sequence[PipelineStep]
) -> dict:
    """What the outcome depends on: the data, the options, and which steps there are."""
    # Of a shard its version; of a folder of own prompts what they say
    versions = []
    for version in records.versions:
        versions.append(version[1:] if isinstance(version, tuple) else version)
    annotator = getattr(options, "annotator", None)
    prompts = annotator.prompts if annotator is not None else None
    words = {}
    for path in sorted(prompts.glob("*.txt")) if prompts else ():
        words[f"prompt {path.stem}"] = hashed(path.read_bytes())
    return {
        "records": len(records),
        "data files": versions,
        "steps": [step.name for step in steps],
        **words,
        **deciding(asdict(options)),
    }


def deciding(options: dict, inside: str = "") -> dict:
    """Options without those of `NO_OUTCOME`, by the names that a command line has for them."""
    kept = {}
    for name, value in options.items():
        spelled = f"{inside}{name}".replace("_", "-")
        if isinstance(value, dict):
            kept |= deciding(value, f"{spelled}.")
        elif name not in NO_OUTCOME:
            kept[spelled] = value
            if isinstance(value, Path):
                kept[spelled] = str(value) if name in OF_DATA else content_of(value)
    return kept


def content_of(path: Path) -> str:
    """A path with a digest of what lies there: weights that were trained on, or templates that were
    edited, are another annotator under the same name."""
    if path.is_file():
        return f"{path} {hashed(path.read_bytes())}"
    try:
        return f"{path} {weights_digest(weights_place(path))}"
    except (ValueError, OSError):
        return str(path)


# --------------------------------------------------------------------------------------- the end


@dataclass
class FunnelCounts:
    """What became of a run: for each step how many came, stayed, changed and went, and why they went."""

    read: int = 0
    written: int = 0
    refused: dict[str, int] = field(default_factory=dict)  # at first sight: no record of these
    steps: dict[str, Counter] = field(default_factory=dict)  # step -> kept, changed, dropped
    reasons: dict[str, Counter] = field(default_factory=dict)  # step -> why they were dropped

    def add(self, history: Sequence[Event]) -> None:
        self.read += 1
        for event in history:
            self.steps.setdefault(event.step, Counter())[event.did] += 1
            if event.did == "dropped":
                self.reasons.setdefault(event.step, Counter())[event.why.split(": ")[0]] += 1

    def report(self) -> str:
        """The funnel: a line a step, with the commonest reasons."""
        lines = [f"{'step':24s} {'came':>10s} {'changed':>10s} {'dropped':>10s} {'left':>10s}"]
        refused = sum(self.refused.values())
        found = f"{self.read + refused:10,d} {0:10,d} {refused:10,d} {self.read:10,d}"
        lines.append(f"{'records':24s} {found}  {commonest(self.refused)}".rstrip())
        for step, did in self.steps.items():
            came = sum(did.values())
            left = came - did["dropped"]
            line = f"{step:24s} {came:10,d} {did['changed']:10,d} {did['dropped']:10,d} {left:10,d}"
            lines.append(f"{line}  {commonest(self.reasons.get(step, {}))}".rstrip())

        # What another call may do better
        unanswered = sum(reasons.get(NO_REPLY, 0) for reasons in self.reasons.values())
        if unanswered:
            lines.append(f"{unanswered:,} had no reply: the same command asks them once more")
        return "\n".join(lines)


def commonest(reasons: dict[str, int]) -> str:
    """The first three reasons with their numbers."""
    first = Counter(reasons).most_common(3)
    return printable(", ".join(f"{number} {reason}" for reason, number in first))


def finish_pipeline(
    options: PipelineOptions,
    ledger: AnswerFiles,
    records: Records,
    over_all: Sequence[PipelineStep],
) -> FunnelCounts:
    """The steps over the whole set, then the rows, the histories and the funnel as files."""
    # All records again, in their order
    items = [item_of(passed, options.out.parent) for passed in all_passed(ledger)]
    for step in over_all:
        alive = [item for item in items if item.alive]
        step(alive)
        assert_marked(step, alive)

    # Who was dropped where and why, and the sum of it
    outcome = FunnelCounts(refused=dict(records.refused))
    for item in items:
        outcome.add(item.history)
    outcome.written = sum(item.alive for item in items)
    write_lines(options.out.with_suffix(".history.jsonl"), history_lines(items))
    totals = json.dumps(vars(outcome), indent=1)
    write_lines(options.out.with_suffix(".funnel.json"), [totals])

    # Rows: pictures lie beside the file already. Last, so that who sees the file has all of it
    if not outcome.written:
        options.out.unlink(missing_ok=True)
        return outcome
    with RowWriter(options.out) as rows:
        for item in items:
            if item.alive:
                rows.write(item.sample, index=item.index)
    for litter in rows.pictures.glob("*.part"):
        litter.unlink()  # of a process that was killed; all others are done
    return outcome


def all_passed(ledger: AnswerFiles) -> list[Passed]:
    """Every record's outcome, in their order. Whoever was answered the second time was answered."""
    found: dict[int, Passed] = {}
    for passed in ledger.stored():
        if passed.index not in found or not passed.unanswered:
            found[passed.index] = passed
    return [found[index] for index in sorted(found)]


def item_of(passed: Passed, folder: Path) -> Item:
    """A record of the ledger as an item, whose pictures lie beside the file that will be written."""
    sample = None
    if passed.row is not None:
        sample = to_sample(passed.row, passed.origin, folder, Dataset(data=""))
    return Item(passed.index, passed.origin, sample, list(passed.history))


def history_lines(items: Sequence[Item]) -> Iterator[str]:
    for item in items:
        line = {"index": item.index, "origin": item.origin, "kept": item.alive}
        line["history"] = [asdict(event) for event in item.history]
        yield json.dumps(line, ensure_ascii=False)


def write_lines(path: Path, lines: Iterator[str] | Sequence[str]) -> None:
    """A text file that appears whole, or not at all."""
    unfinished = path.with_name(path.name + ".part")
    with open(unfinished, "w", encoding="utf-8", errors="backslashreplace") as file:
        for line in lines:
            file.write(line + "\n")
    os.replace(unfinished, path)
