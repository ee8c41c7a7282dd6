"""Multiple choice to free response: the options go, and the letter becomes what it stood for.

What it teaches: a letter can be guessed one time in four, so its reward is mostly luck. A question
that has a number, a word or a formula for an answer is as easy to check and cannot be guessed.

    How long is the side?           How long is the side?
    (A) 12   (B) 15                 ->
    Answer with the letter.
    B                               15

    python -m curation.free_response --data choices.jsonl --out free.jsonl

The paper converts numeric and symbolic choices with a language model; these rules do the same where
the options can be told apart. What is left as it is: a question that makes no sense without its
options ("which of the following ..."), one whose answer is none of them, one whose options are
pictures. Two things must go with the options: the request to answer with a letter, and a chain of
thought that speaks of letters.

Source: SAIL-VL2 section 4.2.3.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from curation.rows import write_rows
from data.readers import Folder
from data.sample import BadSample, Message, Sample
from infra.cli import command

LETTERS = "ABCDEFGHIJ"

# Options on lines of their own, `A. 12` or `(A) 12`, or in one line, `(A) 12 (B) 15`; their header.
OPTION_LINE = re.compile(r"^[ \t]*\(?([A-J])[).:．：、](.*)$", re.MULTILINE)
OPTION_INLINE = re.compile(r"\(([A-J])\)([^()\n]+)")
OPTION_HEADER = re.compile(r"^[ \t]*(?:options|choices|选项)[ \t]*[:：]?[ \t]*$", re.I | re.M)

# The request for a letter, a sentence of its own: `Answer with the letter.`, `请直接回答选项字母。`
SENTENCE_END = re.compile(r"(?<=[.!?。！？\n])")
ASKS = re.compile(r"\b(?:answer|choose|select|pick|respond|reply)\b", re.I)
FOR_A_LETTER = re.compile(r"\b(?:letters?|options?|choices?|alternatives?)\b", re.I)
ASKS_FOR_A_LETTER = re.compile(
    r"\b(?:give|state|write|return|provide)\b.{0,40}?\b(?:options?|choices?|letter (?:of|only|from))\b",
    re.I,
)
ASKS_CHINESE = re.compile(r"选择|选出|回答|给出|写出|请")
LETTER_CHINESE = re.compile(r"选项|字母")

# Words that point at options: without them the question makes no sense.
POINTS_AT_OPTIONS = re.compile(
    r"\b(which|these|following|options?|choices?|above|below)\b|下列|以下|哪", re.I
)

# `B`, `(B)`, `B.`, `B. 15` as an answer; and a letter in a chain of thought.
LETTER = re.compile(r"\(?([A-J])[).:．：、]?(?:\s+(.*))?", re.DOTALL)
LETTER_IN_CHAIN = re.compile(
    r"\([A-J]\)"  # (B)
    r"|\b(?i:options?|choices?|answer(?: is)?|letter)\s*:?\s*\**[A-J]\b"  # option B, answer is B
    r"|\bA\b(?=\s*(?:[).,;:]|$|is (?:right|correct|wrong)))"  # A, which is an article elsewhere
    r"|(?<![\w'])[B-HJ]\b(?![\w'])"  # B
    r"|选项?\s*[A-J]|答案是?\s*[A-J]",
    re.MULTILINE,
)


def free_response(samples: list[Sample]) -> tuple[list[Sample], list[Sample]]:
    """(converted or already free, left as they are)."""
    free, left = [], []
    for sample in samples:
        converted = without_options(sample)
        if converted is None:
            left.append(sample)
        else:
            free.append(converted)
    return free, left


def without_options(sample: Sample) -> Sample | None:
    """The sample as a free question: itself if it has no options, None if it cannot be converted."""
    places = [i for i, message in enumerate(sample.messages) if message.role == "assistant"]
    if not places or places[-1] == 0:
        return sample
    at = places[-1]
    user = sample.messages[at - 1]
    texts = [i for i, part in enumerate(user.parts) if isinstance(part, str)]
    truth = sample.facts.get("answer")

    # The part that holds the options. A letter without a text (of a picture, say) stays a letter.
    with_options = [i for i in texts if listed_options(user.parts[i])]
    if not with_options:
        whole = "\n".join(user.parts[i] for i in texts)
        return None if is_letter_of(truth, whole) else sample

    # The letter's text, and a question that still is one.
    place = with_options[-1]
    answer_text = text_of_letter(truth, listed_options(user.parts[place]))
    question = stripped(user.parts[place])
    rest = "".join(question if i == place else user.parts[i] for i in texts)
    if answer_text is None or not rest.strip() or POINTS_AT_OPTIONS.search(rest):
        return None

    parts = list(user.parts)
    parts[place] = question
    messages = list(sample.messages)
    messages[at - 1] = replace(user, parts=tuple(parts))
    messages[at] = answered_in_words(messages[at], answer_text)
    facts = free_facts(sample.facts, answer_text, rest)
    return replace(sample, messages=tuple(messages), facts=facts)


def listed_options(text: str) -> dict[str, str]:
    """Letter -> text of the options, {} unless they are A, B, ... in this order and have a text each."""
    for pattern in (OPTION_LINE, OPTION_INLINE):
        found = [(letter, said.strip()) for letter, said in pattern.findall(text)]
        letters = "".join(letter for letter, _ in found)
        if len(found) >= 2 and LETTERS.startswith(letters) and all(said for _, said in found):
            return dict(found)
    return {}


def stripped(text: str) -> str:
    """Without options, their header, and the request for a letter."""
    on_lines = len(OPTION_LINE.findall(text)) >= 2
    text = (OPTION_LINE if on_lines else OPTION_INLINE).sub("", text)
    text = OPTION_HEADER.sub("", text)
    sentences = SENTENCE_END.split(text)
    text = "".join("" if asks_for_letter(sentence) else sentence for sentence in sentences)

    # No empty lines where something stood.
    lines = [line.rstrip() for line in text.split("\n")]
    first, rest = lines[0], [line for line in lines[1:] if line]
    return "\n".join([first, *rest])


def asks_for_letter(sentence: str) -> bool:
    """Whether this is the request that goes with the options, and no question."""
    sentence = sentence.strip()
    if sentence.endswith(("?", "？")):
        return False
    if ASKS_CHINESE.search(sentence) and LETTER_CHINESE.search(sentence):
        return True
    if ASKS_FOR_A_LETTER.search(sentence):
        return True
    return bool(ASKS.search(sentence) and FOR_A_LETTER.search(sentence))


def is_letter_of(truth: object, text: str) -> bool:
    """Whether the answer is one letter, and the question has something under that letter."""
    letter = str(truth).strip("(). ")
    if len(letter) != 1 or letter not in LETTERS:
        return False
    return re.search(rf"(?<!\w)\(?{letter}[).:．：、]", text) is not None


def text_of_letter(answer: object, options: dict[str, str]) -> str | None:
    """What the letter stands for. None when the answer is no letter of an option."""
    accepted = answer if isinstance(answer, (list, tuple)) else [answer]
    if len(accepted) != 1:
        return None
    match = LETTER.fullmatch(str(accepted[0]).strip())
    if match is None or match[1] not in options:
        return None

    # `B. 15` must say what B says.
    text = options[match[1]]
    repeated = (match[2] or text).strip()
    return text if repeated == text else None


def answered_in_words(answer: Message, truth: str) -> Message:
    """The answer in words, without a chain that speaks of letters."""
    chain = answer.think
    if chain is not None and LETTER_IN_CHAIN.search(chain):
        chain = None
    return replace(answer, parts=(truth,), think=chain)


def free_facts(facts: dict, truth: str, question: str) -> dict:
    """The facts of the free question. A grader for letters does not fit it."""
    changed = facts | {"answer": truth}
    if LETTER_IN_CHAIN.search(str(facts.get("chain") or "")):
        del changed["chain"]
    if changed.get("grader") in ("letter", "choice", "mcq"):
        del changed["grader"]
    if "question" in facts:
        changed["question"] = question.strip()
    return changed


# ---------------------------------------------------------------------------------------- command


@dataclass
class FreeResponseOptions:
    """Turn multiple choice into free response, where that makes sense."""

    data: Path  # JSON, JSONL, TSV, tar, parquet, a folder of them, or a mixture file
    out: Path  # JSONL, in our own format
    images: Path | None = None  # folder of the images; default: beside the data
    keep_choices: bool = False  # write questions that cannot be converted too, as they are
    limit: int = 0  # records of the data; 0: all


def convert_choices(options: FreeResponseOptions) -> None:
    if options.out.suffix != ".jsonl":
        raise ValueError(f"--out {options.out}: a JSONL file is written, call it .jsonl")
    folder = Folder(options.data, options.images)
    counts = dict.fromkeys(("read", "already free", "converted", "left as they are"), 0)

    def rows():
        for index in range(min(options.limit or len(folder), len(folder))):
            sample = folder[index]
            counts["read"] += 1
            if isinstance(sample, BadSample):
                folder.faults.add(sample)
                continue

            converted = without_options(sample)
            if converted is None:
                counts["left as they are"] += 1
                if options.keep_choices:
                    yield sample, {}
            else:
                counts["already free" if converted is sample else "converted"] += 1
                yield converted, {}

    written = write_rows(options.out, rows(), folder.faults)
    for step, number in (counts | {"written": written}).items():
        print(f"{step:18s} {number:9d}")
    print(folder.faults.report())
    print(f"wrote {options.out}")


if __name__ == "__main__":
    command(convert_choices)
