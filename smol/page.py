"""The page of `make smol`: what SmolLM2 said of pictures that it never saw, and what it says of text.

What it teaches: nothing new; tools/report.py draws, here stands what. Same data, same bytes.

    results, graded answers --write_sight_page--> report.html      (no script, nothing from a network)
"""

from pathlib import Path

from data.encode import Encoder
from data.images import open_image
from data.sample import Sample, Video
from evaluate import Graded
from tools.drawing import bar_chart, el, facts, html_page, section
from tools.report import answers_by_family

SHOWN = 6  # answers of each family
MEANINGS = {
    "seen": "its own picture",
    "swapped": "another's",
    "blind": "blind guess",
    "bigram": "bigram",
}


def pictures_of_sample(sample: Sample, encoder: Encoder) -> list:
    """Its still pictures, opened; of a video none."""
    parts = [part for message in sample.messages for part in message.parts]
    stills = [part for part in parts if not isinstance(part, (str, Video))]
    return [open_image(part, sample.root or encoder.root, sample.origin) for part in stills]


def answer_entries(graded: list[Graded], encoder: Encoder) -> list[dict]:
    """The first answers of each family, as tools/report.py shows them."""
    entries = []
    shown: dict[str, int] = {}
    for one in graded:
        shown[one.family] = shown.get(one.family, 0) + 1
        if shown[one.family] > SHOWN:
            continue
        entries.append(
            {
                "family": one.family,
                "question": one.question,
                "truth": one.truth,
                "said": one.said,
                "score": one.score,
                "mode": "direct",
                "images": pictures_of_sample(one.sample, encoder),
            }
        )
    return entries


def loss_table(losses: dict[str, float]) -> str:
    """Four losses in a table."""
    heads = el("tr", *[el("th", meaning) for meaning in MEANINGS.values()])
    cells = el("tr", *[el("td", f"{losses[name]:.3f}") for name in MEANINGS])
    return el("div", el("table", heads, cells), cls="scroll")


def score_rows(scores: dict[str, list]) -> list[tuple]:
    """Families as bars with their chance and error."""
    return [
        (family, f"{accuracy:.0%} of {n}", [accuracy], chance, error)
        for family, (accuracy, chance, error, n) in scores.items()
    ]


def write_sight_page(path: Path, results: dict, graded: list[Graded], encoder: Encoder) -> None:
    """A page of three parts: numbers, scores, answers."""
    losses = results["losses"]
    text = results["text"]
    head = facts(
        (f"{losses['seen']:.2f}", "nats a token of held-out captions, seen"),
        (f"{losses['margin']:.2f}", "less than its own blind guess"),
        (f"{text['change']:+.2%}", f"text perplexity, from {text['before']:.2f}"),
    )
    told = (
        "The blind guess is the model's own mean over eight other pictures; the bigram counts "
        "pairs of tokens in the training answers."
    )
    note = "Accuracy on held-out questions; the mark is the best blind player's."
    parts = [
        el("h1", "SmolLM2 learns to see"),
        head,
        section("Captions", told, loss_table(losses)),
        section("Questions", note, bar_chart("accuracy", score_rows(results["scores"]), 1.0)),
        section(
            "Answers",
            "The first of each family.",
            answers_by_family(answer_entries(graded, encoder)),
        ),
    ]
    path.write_text(html_page("SmolLM2 learns to see", *parts), encoding="utf-8")
