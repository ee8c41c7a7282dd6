"""The table of contents: `python -m curation`, and `python -m curation NAME ...` for one of them.

What it teaches: the paper's data half in the order in which data goes through it. Every entry is a
command from files to files, runs by itself (`python -m curation.NAME`), and its module says what the
paper publishes of it and what is ours.
"""

import importlib
import sys
from typing import NamedTuple


class Entry(NamedTuple):
    """A command: its name, where its function stands, what it makes of what."""

    name: str
    place: str
    line: str


# Chapter -> its commands, in the order in which data goes through SAIL-VL2's Figure 3.
CONTENTS: dict[str, tuple[Entry, ...]] = {
    "Captions (SAIL-Captioner, SAIL-Caption2)": (
        Entry(
            "captioner",
            "curation.captioner:captioner",
            "a reference set by a strong annotator; captions at scale by a small model",
        ),
        Entry(
            "recaption",
            "curation.recaption:recaption",
            "own pictures with bad texts become captions and questions, with a page",
        ),
        Entry("score", "curation.judges:annotate_captions", "richness and alignment, 1 to 5"),
        Entry(
            "uniform", "curation.judges:uniform_captions", "lessons for judges, even over scores"
        ),
        Entry("filter", "curation.judges:filter_captions", "what scores below 3 or gets a no goes"),
        Entry(
            "measure", "curation.judges:measure_judges", "precision and recall of judges: Table 2"
        ),
        Entry(
            "caption-statistics",
            "curation.caption_statistics:print_statistics",
            "how rich captions are: SAIL-VL's Table 1",
        ),
        Entry(
            "side-by-side",
            "curation.side_by_side:compare_files",
            "good, same or bad of two files of captions: SAIL-VL's Table 8",
        ),
    ),
    "Charts": (
        Entry("charts", "curation.charts:make_charts", "eight kinds, two languages, from data"),
        Entry(
            "chart-check",
            "curation.chart_check:check_charts",
            "answers of written charts, computed a second time",
        ),
    ),
    "Questions and answers (Caption2QA, SAIL-Instruction2, SAIL-Video)": (
        Entry(
            "caption2qa",
            "curation.caption2qa:write_questions",
            "captions become questions that they answer",
        ),
        Entry(
            "classes",
            "curation.classes:classes_command",
            "latent classes: draw evenly, answer again",
        ),
        Entry(
            "video-scores",
            "curation.video_scores:score_videos",
            "alignment, richness, difficulty of questions about videos",
        ),
        Entry(
            "ratings",
            "curation.ratings:ratings_command",
            "complexity, challenge, relevance, 1 to 5",
        ),
    ),
    "What data is worth": (
        Entry("balance", "curation.balance:balance", "weights of data sets; texts that repeat go"),
        Entry(
            "evaluate-data",
            "curation.evaluating:evaluate_data",
            "quick, composition and incremental evaluation; annealing before it",
        ),
    ),
    "Chains and RL": (
        Entry("long-cot", "curation.long_cot:curate_chains", "chains of thought, made and cleaned"),
        Entry(
            "difficulty",
            "curation.difficulty:measure_difficulty",
            "pass@k of a model: what RL can learn from, and a hard set",
        ),
        Entry(
            "free-response",
            "curation.free_response:convert_choices",
            "multiple choice becomes free response",
        ),
        Entry("chains", "curation.chains:harvest_chains", "a model's own right chains"),
    ),
    "To look at, and to try": (
        Entry("report", "curation.report:review", "a page of kept and dropped samples of any run"),
        Entry("noise", "curation.noise:write_noisy", "drawn captions, wrong in known ways"),
        Entry("album", "curation.album:album", "a drawn folder with bad texts, and its grading"),
    ),
}


def contents() -> str:
    """The table as text."""
    entries = [entry for chapter in CONTENTS.values() for entry in chapter]
    widest = max(len(entry.name) for entry in entries)
    lines = ["python -m curation NAME --help", ""]
    for chapter, commands in CONTENTS.items():
        lines.append(chapter)
        lines += [f"    {entry.name:{widest}s}  {entry.line}" for entry in commands]
    return "\n".join(lines)


def run_entry(words: list[str]) -> None:
    """The first word names a command, the others are its options."""
    if not words or words[0] in ("-h", "--help"):
        print(contents())
        return

    # Looked up only now: a table of contents should not load PyTorch
    known = {entry.name: entry for chapter in CONTENTS.values() for entry in chapter}
    name, *options = words
    if name not in known:
        sys.exit(f"error: no command {name!r}\n\n{contents()}")
    module, function = known[name].place.split(":")
    sys.argv[0] = f"python -m curation {name}"
    from infra.cli import command

    command(getattr(importlib.import_module(module), function), options)


if __name__ == "__main__":
    run_entry(sys.argv[1:])
