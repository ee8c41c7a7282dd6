"""Real noise: which titles of Open Clip Art describe their pictures, by a rule and by a small judge.

What it teaches: how far one gets where nobody knows the truth. A hundred drawn titles were labelled by eye
(curation/clipart_labels.json, 1 to 5 by the criteria of prompts/ita.txt). Against them stand

    repeated   a title that more than 10 pictures have describes none of them: no model at all
    labelled   the toy, trained on every other label, measured on the rest
    ruled      the toy, trained on what the rule says of all other titles, and on titles that were given
               another's picture; measured on all labels

    python -m tools.clipart --out runs/clipart
    python -m claims.titles --titles runs/clipart/titles.jsonl --model runs/toy/final

Legend: the positive class is the titles to be dropped, those below 3. Simplified: one labeller; a judge of
a million weights that sees 32 x 32 pixels reads letters, not names of things.
"""

import json
import random
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import sft
from curation.annotators import OwnModel
from curation.judges import Tally, caption_request, judgement, read_reply, read_whole
from curation.pipeline import write_lines
from curation.requests import PROMPTS, Prompts
from curation.rows import write_rows
from data.encode import Encoder
from data.readers import Folder
from data.sample import Faults, Message, Sample
from generate import load_model
from infra.cli import command
from recipe import Setup, fit

LABELS = Path(__file__).parents[1] / "curation" / "clipart_labels.json"
QUESTION = "ita_yesno"
MOST = 10  # pictures that a title may have


@dataclass
class TitlesOptions:
    """Measure a rule and two small judges on labelled titles of Open Clip Art."""

    titles: Path = Path("runs/clipart/titles.jsonl")  # as tools.clipart writes them
    model: Path = Path("runs/toy/final")  # where the judges start
    out: Path = Path("runs/curation/titles")
    steps: int = 150
    seed: int = 0


def labelled_titles(rows: list[Sample]) -> tuple[list[Sample], list[Sample]]:
    """(Titles with a label, in the order of the labels, with it in their facts; all others)."""
    scores = json.loads(LABELS.read_text())["ita"]
    by_name = {name_of(row): row for row in rows}
    missing = sorted(set(scores) - set(by_name))
    if missing:
        raise ValueError(f"no drawing {missing[0]} among the titles: make them by tools.clipart")
    labelled = [scored(by_name[name], score) for name, score in scores.items()]
    return labelled, [row for row in rows if name_of(row) not in scores]


def name_of(row: Sample) -> str:
    """Of a drawing: its picture's path, without folder and suffix."""
    picture = row.messages[0].parts[0]
    return Path(picture).with_suffix("").as_posix().removeprefix("images/")


def scored(row: Sample, score: int) -> Sample:
    return replace(row, facts={"ita": score})


def title_of(row: Sample) -> str:
    return row.messages[-1].parts[0]


def ruled_titles(rows: list[Sample], times: Counter, seed: int) -> list[Sample]:
    """Titles with a score by the rule; beside each that is kept, the same title with another's picture."""
    rng = random.Random(seed)
    found = []
    for row in rows:
        if times[title_of(row)] > MOST:
            found.append(scored(row, 1))
            continue
        other = rng.choice(rows)
        mistaken = Message("assistant", (title_of(other),))
        found.append(scored(row, 5))
        found.append(scored(replace(row, messages=(row.messages[0], mistaken)), 1))
    return found


def trained_on(options: TitlesOptions, rows: list[Sample], name: str) -> OwnModel:
    """A judge that was trained on scored titles, as many of a yes as of a no."""
    # As rows of a file, which the ordinary reader reads
    prompts = Prompts(PROMPTS / "toy")
    asked = [judgement(QUESTION, row, prompts) for row in rows]
    asked = [replace(row, task=row.facts["answer"]) for row in asked]
    data = options.out / f"{name}.jsonl"
    write_rows(data, ((row, {}) for row in asked), Faults(strict=True))

    # From the toy's weights
    model, tokenizer = load_model(options.model)
    setup = Setup(model, Encoder(tokenizer, model.config, None), Folder(data))
    mixture = {"yes": 1.0, "no": 1.0}
    stage = replace(
        sft.TOY["sft1"], mixture=mixture, steps=options.steps, lr=3e-3, seed=options.seed
    )
    fit(setup, stage)
    model.save_pretrained(options.out / name)
    tokenizer.save(options.out / name)
    return OwnModel(options.out / name, prompts, max_new=8)


def tally_of_judge(judge: OwnModel, rows: list[Sample]) -> Tally:
    tally = Tally()
    responses = judge.annotate([caption_request(QUESTION, row) for row in rows])
    for row, response in zip(rows, responses):
        tally.add(read_reply(QUESTION, response), row.facts["ita"])
    return tally


def tally_of_rule(rows: list[Sample], times: Counter) -> Tally:
    tally = Tally()
    for row in rows:
        tally.add("no" if times[title_of(row)] > MOST else "yes", row.facts["ita"])
    return tally


def titles_table(tallies: dict[str, Tally]) -> str:
    lines = [
        "| who judges | precision | recall | of the kept: precision | recall | titles |",
        "|---|---|---|---|---|---|",
    ]
    for name, tally in tallies.items():
        shares = " | ".join(f"{value:.3f}" for value in (*tally.dropping, *tally.keeping))
        lines.append(f"| {name} | {shares} | {tally.captions} |")
    return "\n".join(lines)


def claim_titles(options: TitlesOptions) -> None:
    rows = list(read_whole(options.titles))
    labelled, others = labelled_titles(rows)
    times = Counter(title_of(row) for row in rows)

    # The rule; the toy as it is; the toy taught by labels, and by the rule
    untaught = OwnModel(options.model, Prompts(PROMPTS / "toy"), max_new=8)
    by_labels = trained_on(options, labelled[::2], "labelled")
    by_rule = trained_on(options, ruled_titles(others, times, options.seed), "ruled")
    tallies = {
        f"repeated more than {MOST} times": tally_of_rule(labelled, times),
        "the toy, zero-shot": tally_of_judge(untaught, labelled),
        "the toy, every other label": tally_of_judge(by_labels, labelled[1::2]),
        "the toy, the rule's labels": tally_of_judge(by_rule, labelled),
    }
    numbers = {name: vars(tally) for name, tally in tallies.items()}
    write_lines(options.out / "numbers.json", [json.dumps(numbers, indent=1)])
    print(titles_table(tallies))


if __name__ == "__main__":
    command(claim_titles)
