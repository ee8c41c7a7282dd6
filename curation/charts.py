"""Charts: from specs to pictures with captions and questions, in eight kinds and two languages.

What it teaches: charts are the one kind of picture whose truth is known to the last digit, because the
data is there before the picture. So they are made by the hundred thousand; what has to be earned is that
each can be read and each answer is right.

    kind, language --spec--> ChartSpec --valid--> --draw--> picture --ask--> caption, questions --check-->
        by seed, by a model          chart_specs     chart_pictures    chart_questions     chart_check
        or from --data

    python -m curation.charts --count 1000 --out charts.jsonl --sheet sheet.png
    python -m curation.charts --count 1000 --out zh.jsonl --kinds bar=2 line=1 --languages zh=1
    python -m curation.charts --data specs.jsonl --out charts.jsonl              # a spec a line
    python -m curation.charts --count 1000 --out charts.jsonl --annotator.url http://localhost:8000/v1 ...

A toy reads them as well: shapes alone, in 64 x 64 pixels, seen whole. Answers of held-out charts, and what
never looking would score (LOG.md):

    python -m curation.charts --count 3000 --questions 5 --out train.jsonl --plain --pixels 64 --caption false
    python -m curation.charts --count 1000 --questions 1 --out held.jsonl --seed 1 --plain --pixels 64 \\
        --caption false
    python sft.py sft1 --data train.jsonl --model runs/toy/soup --any-resolution --steps 500 --out runs/charts
    python evaluate.py --model runs/charts --data held.jsonl

Needs requirements/charts.txt. Resumes and runs on several ranks as every pipeline does; the same seed and
versions draw the same bytes.

Source: SAIL-VL2 section 3.1 has a language model write code, captions and questions of these eight
kinds, with model, kind, language and rate to configure (400K charts, English and Chinese equally many).
Our choice: the model writes data, not code, and questions and answers are computed from it.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import tyro
from PIL import Image

from curation.annotators import AnnotatorOptions, open_annotator
from curation.chart_check import chart_fault
from curation.chart_pictures import (
    PACKAGES,
    Canvas,
    check_letters,
    check_places,
    figure_of,
    pixels_of,
    read_back,
)
from curation.chart_questions import ASKS, CAPTION_REQUESTS, PLAIN, caption_of, questions_of
from curation.chart_specs import KINDS, LANGUAGES, THEMES, invent_spec, spec_of, validate_spec
from curation.pipeline import Item, PipelineOptions, PipelineStep, run_pipeline
from curation.requests import Annotator, Request, generator_of, json_in
from curation.rows import appear
from data.sample import BadSample, Message, Sample
from infra.cli import command
from infra.system import require_packages
from scale import parallel

# ---------------------------------------------------------------------------------------- options


@dataclass
class ChartOptions(PipelineOptions):
    """Draw charts and ask about them."""

    # specs as JSON, one a line; none: drawn by seed, or asked for if an annotator is named
    data: Path | None = field(default=None, kw_only=True)
    images: tyro.conf.Suppress[Path | None] = None
    count: int = 1000  # charts to begin with, without --data; what cannot be read is dropped
    kinds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 1.0))
    languages: dict[str, float] = field(default_factory=lambda: dict.fromkeys(LANGUAGES, 1.0))
    caption: bool = True  # the first turn asks for a caption
    questions: int = 3  # of each chart, at most
    asks: dict[str, float] = field(default_factory=dict)  # rates of questions; none: all alike
    pixels: int = 480  # width of a picture
    plain: bool = False  # shapes without any letter, for models that see few pixels
    font: Path | None = None  # a font file for Chinese; none: Noto Sans SC and Noto Serif SC
    topics: Path | None = None  # a topic a line, for the annotator; none: ours
    sheet: Path | None = None  # a picture to write, of one chart of each kind and language
    annotator: AnnotatorOptions = field(default_factory=AnnotatorOptions)


def check_chart_options(options: ChartOptions) -> None:
    """Raises ValueError for rates of what there is not."""
    for name, rates, known in (
        ("kinds", options.kinds, KINDS),
        ("languages", options.languages, LANGUAGES),
        ("asks", options.asks, PLAIN if options.plain else tuple(ASKS)),
    ):
        strange = sorted(set(rates) - set(known))
        if strange:
            raise ValueError(f"--{name} {strange[0]}: choose from {', '.join(known)}")
        if rates and (min(rates.values()) < 0 or not any(rates.values())):
            raise ValueError(f"--{name}: rates are positive, at least one of them")
    if options.questions < 1 and not options.caption:
        raise ValueError("--questions 0 --caption false: nothing would be asked")
    if options.pixels < 32:
        raise ValueError("--pixels: at least 32")


# ------------------------------------------------------------------------------------- what comes in


class Wishes(Sequence):
    """Which kind in which language each chart shall be, by their rates."""

    # Nothing is read
    versions = ()
    refused: dict[str, int] = {}

    def __init__(self, options: ChartOptions):
        self.options = options

    def __len__(self) -> int:
        return self.options.count

    def __getitem__(self, index: int) -> Sample:
        if index >= len(self):
            raise IndexError(index)

        # Its own numbers, whatever came before it
        options = self.options
        rng = generator_of(options.seed, index, "wish")
        wish = {}
        for name, rates in (("kind", options.kinds), ("language", options.languages)):
            wish[name] = rng.choices([*rates], [*rates.values()])[0]
        return Sample((), "chart", f"chart {index}", wish)


class SpecFile(Sequence):
    """Specs that somebody wrote, one a line. Simplified: the lines are kept in memory."""

    refused: dict[str, int] = {}

    def __init__(self, path: Path, limit: int = 0):
        lines = path.read_bytes().splitlines()
        self.versions = ((str(path), len(lines), path.stat().st_mtime_ns),)
        self.name = path.name
        self.lines = lines[: limit or len(lines)]

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> Sample | BadSample:
        place = f"{self.name}:{index + 1}"
        try:
            record = json.loads(self.lines[index])
        except (ValueError, RecursionError) as error:
            return BadSample("no JSON", f"{place}: {str(error)[:200]}")
        return Sample((), "chart", place, {"spec": record})


# -------------------------------------------------------------------------------------------- steps


class InventedSpecs:
    """Specs drawn by seed, as wished."""

    name = "spec"

    def __init__(self, seed: int, plain: bool):
        self.seed = seed
        self.plain = plain

    def __call__(self, items: list[Item]) -> None:
        for item in items:
            rng = generator_of(self.seed, item.index, self.name)
            wish = item.sample.facts
            spec = invent_spec(rng, wish["kind"], wish["language"], self.plain)
            item.keep(self.name, spec=spec.record())


class WrittenSpecs:
    """Specs that an annotator is asked for, as wished."""

    name = "spec"

    def __init__(self, annotator: Annotator, seed: int, topics: Path | None):
        self.annotator = annotator
        self.seed = seed
        self.topics = None
        if topics:
            self.topics = [line for line in topics.read_text("utf-8").splitlines() if line.strip()]
            if not self.topics:
                raise ValueError(f"--topics {topics}: it is empty")

    def __call__(self, items: list[Item]) -> None:
        requests = [self.request(item) for item in items]
        for item, response in zip(items, self.annotator.annotate(requests), strict=True):
            if response.text is None:
                item.drop(self.name, response.fault)
                continue
            record = json_in(response.text)
            wish = item.sample.facts
            if not isinstance(record, dict):
                item.drop(self.name, f"no JSON: {response.text[:100]!r}")
            elif any(record.get(name) != wish[name] for name in ("kind", "language")):
                item.drop(
                    self.name, f"another chart: {record.get('kind')}, {record.get('language')}"
                )
            else:
                item.keep(self.name, spec=record)

    def request(self, item: Item) -> Request:
        wish = item.sample.facts
        rng = generator_of(self.seed, item.index, "topic")
        theme = rng.choice(THEMES[wish["language"]])
        topic = rng.choice(self.topics) if self.topics else f"{theme.y} / {theme.x}"
        fields = {"kind": wish["kind"], "language": wish["language"], "topic": topic}
        words = f"{wish['kind']} chart, {wish['language']}"
        about = replace(item.sample, facts=wish | {"words": words})
        return Request("chart_spec", fields, about=about)


class ValidSpecs:
    """Drops what cannot be drawn, read and asked about."""

    name = "valid"

    def __call__(self, items: list[Item]) -> None:
        for item in items:
            try:
                spec = spec_of(item.sample.facts["spec"])
                validate_spec(spec)
            except BadSample as fault:
                item.drop(self.name, str(fault))
            else:
                item.keep(self.name, spec=spec.record(), language=spec.language)


class DrawnCharts:
    """The picture of a spec, and what it shows; what cannot be read is dropped."""

    name = "draw"

    def __init__(self, canvas: Canvas):
        self.canvas = canvas

    def __call__(self, items: list[Item]) -> None:
        for item in items:
            spec = spec_of(item.sample.facts["spec"])
            try:
                check_letters(spec, self.canvas)
                figure = figure_of(spec, self.canvas)
                check_places(figure)
                shown = read_back(figure, spec)
            except BadSample as fault:
                item.drop(self.name, str(fault))
                continue
            picture = Message("user", (pixels_of(figure),))
            sample = replace(item.sample, messages=(picture,))
            item.change(self.name, sample, shown=shown.record())


class AskedAbout:
    """Caption and questions as turns behind the picture; the last one's answer is the row's truth."""

    name = "ask"

    def __init__(self, options: ChartOptions):
        self.options = options

    def __call__(self, items: list[Item]) -> None:
        options = self.options
        for item in items:
            # Questions with their answers
            spec = spec_of(item.sample.facts["spec"])
            rng = generator_of(options.seed, item.index, self.name)
            found = questions_of(spec, rng, options.questions, options.asks, options.plain)
            turns = [(asked.question, asked.answer) for asked in found]
            facts = {"asked": [asdict(asked) for asked in found], "category": spec.kind}

            # The caption before them
            if options.caption:
                facts["caption"] = caption_of(spec, options.plain)
                turns.insert(0, (rng.choice(CAPTION_REQUESTS[spec.language]), facts["caption"]))
            if not turns:
                item.drop(self.name, f"nothing to ask: a {spec.kind}")
                continue

            # By what it is graded
            facts["question"], facts["answer"] = turns[-1]
            facts["family"] = found[-1].ask if found else "caption"
            if found:
                facts["grader"] = found[-1].grader
            item.change(self.name, chart_conversation(item.sample, turns), **facts)


def chart_conversation(sample: Sample, turns: list[tuple[str, str]]) -> Sample:
    """Picture, question, answer, question, answer, ..."""
    (picture,) = sample.messages[0].parts
    messages = []
    for number, (question, answer) in enumerate(turns):
        parts = (question,) if number else (picture, "\n" + question)
        messages += [Message("user", parts), Message("assistant", (answer,))]
    return replace(sample, messages=tuple(messages))


class CheckedAnswers:
    """Answers once more, from what was drawn; a chart with a wrong one is dropped."""

    name = "check"

    def __call__(self, items: list[Item]) -> None:
        for item in items:
            fault = chart_fault(item.sample)
            if fault:
                item.drop(self.name, fault)
            else:
                number = len(item.sample.facts["asked"])
                item.keep(self.name, f"{number} answers recomputed")


# ------------------------------------------------------------------------------------------ command


def make_charts(options: ChartOptions) -> None:
    """From nothing, or from specs, to rows with pictures. Raises ValueError for options that make no
    sense and for missing packages."""
    require_packages("-r requirements/charts.txt", *PACKAGES)
    check_chart_options(options)
    source, first = source_of(options)
    canvas = Canvas(options.pixels, options.plain, options.font)
    steps = [*first, ValidSpecs(), DrawnCharts(canvas), AskedAbout(options), CheckedAnswers()]
    outcome = run_pipeline(options, steps, records=source)

    # The funnel, what asking cost, and something to look at
    rank, _ = parallel.place()
    if rank == 0:
        print(outcome.report())
        for step in first:
            if isinstance(step, WrittenSpecs):
                print(step.annotator.report())
        if options.sheet:
            write_sheet(options.out, options.sheet)
    parallel.stop()


def source_of(options: ChartOptions) -> tuple[Sequence, list[PipelineStep]]:
    """The records, and the step that makes specs of them, if they are none."""
    asked = options.annotator
    named = bool(asked.model or asked.url or asked.oracle)
    if options.data and named:
        raise ValueError("--data has specs already: leave the --annotator out")
    if options.data:
        return SpecFile(options.data, options.limit), []
    if named:
        annotator = open_annotator(asked, options.seed)
        return Wishes(options), [WrittenSpecs(annotator, options.seed, options.topics)]
    return Wishes(options), [InventedSpecs(options.seed, options.plain)]


CELL = (400, 300)  # pixels of a chart on the sheet
COLUMNS = 4


def write_sheet(rows: Path, path: Path) -> None:
    """The first chart of each kind and language, side by side, as a PNG of few colours."""
    # The first of each
    firsts: dict[tuple[str, str], Path] = {}
    for line in rows.read_text("utf-8").splitlines():
        row = json.loads(line)
        facts = row["facts"]
        firsts.setdefault((facts["language"], facts["category"]), rows.parent / row["images"][0])

    # As many rows of the sheet as are needed
    height = -(-len(firsts) // COLUMNS) * CELL[1]
    sheet = Image.new("RGB", (COLUMNS * CELL[0], height), "white")
    order = {kind: place for place, kind in enumerate(KINDS)}
    for place, key in enumerate(sorted(firsts, key=lambda key: (key[0], order[key[1]]))):
        with Image.open(firsts[key]) as picture:
            small = picture.convert("RGB")
        small.thumbnail((CELL[0] - 12, CELL[1] - 12), Image.Resampling.LANCZOS)
        left = place % COLUMNS * CELL[0] + (CELL[0] - small.width) // 2
        top = place // COLUMNS * CELL[1] + (CELL[1] - small.height) // 2
        sheet.paste(small, (left, top))

    # Few colours, so that it stays small
    path.parent.mkdir(parents=True, exist_ok=True)
    few = sheet.quantize(256)
    appear(path, lambda unfinished: few.save(unfinished, "PNG", optimize=True))


if __name__ == "__main__":
    command(make_charts)
