"""How rich captions are: SAIL-VL's Table 1 for any files of captions.

What it teaches: two sets of captions are compared without reading them by how much is different in them.
All captions of a sample of the set are poured together, and the different pairs and triples of words,
nouns, verbs and adjectives in there are counted, each divided by the number of captions. A set that says
"a picture of a nice thing" ten thousand times has long captions and few different words.

    | data | language | captions | length | 2-grams | 3-grams | nouns | verbs | adjectives |

    python -m curation.caption_statistics --data ours.jsonl theirs.jsonl --samples 10000

Such counts grow more slowly than the number of captions, so numbers compare only at equal `--samples`
(the paper drew 10,000 of each set; it does not print how "unique per sample" is counted: fewer than one
noun a caption of 88 words leaves this reading).

Source: SAIL-VL (arXiv 2501.05952) Table 1, with NLTK and Jieba. NLTK downloads its tagger's weights, so the
English tagger here is TextBlob's, whose word list is inside its package; Jieba's dictionary is inside its own
(requirements/words.txt). Without them the last three columns stay empty, and n-grams need neither.
"""

import random
from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Callable, Iterable, Literal

from curation.balance import words
from curation.captioner import caption_in
from data.readers import Folder
from data.sample import BadSample
from infra.cli import command
from infra.table import markdown
from infra.text import printable

Language = Literal["auto", "english", "chinese"]
KINDS = ("noun", "verb", "adjective")
Tagger = Callable[[str], Iterable[tuple[str, str]]]  # text -> (word, its kind or "")

# The first letters of a tag, as each tagger spells them.
ENGLISH_TAGS = {"NN": "noun", "VB": "verb", "JJ": "adjective"}
CHINESE_TAGS = {"n": "noun", "v": "verb", "a": "adjective"}
NOT_INSTALLED = "-"


@dataclass
class CaptionNumbers:
    """A row of the table. length: words a caption (of Chinese: characters and other words), the
    others: different ones over all captions, for each caption; None without a tagger."""

    name: str
    language: str
    captions: int
    length: float
    pairs: float
    triples: float
    kinds: dict[str, float | None]

    def row(self) -> list[str]:
        """Its cells, as in HEAD."""
        cells = [self.name, self.language, f"{self.captions:,}", f"{self.length:.2f}"]
        for value in (self.pairs, self.triples, *self.kinds.values()):
            cells.append(NOT_INSTALLED if value is None else f"{value:.4g}")
        return cells


MEASURED = ("length", "2-grams", "3-grams", "nouns", "verbs", "adjectives")
HEAD = ("data", "language", "captions", *MEASURED)


def measure_captions(name: str, captions: list[str], language: Language = "auto") -> CaptionNumbers:
    """The numbers of a set. Raises ValueError for none at all."""
    if not captions:
        raise ValueError(f"{name}: no captions")
    if language == "auto":
        language = language_of(captions)

    # Neighbours within a caption, never across two
    length = 0
    pairs: set[tuple[str, ...]] = set()
    triples: set[tuple[str, ...]] = set()
    for caption in captions:
        found = [word for word in words(caption) if word[0].isalnum()]
        length += len(found)
        pairs.update(zip(found, found[1:]))
        triples.update(zip(found, found[1:], found[2:]))

    n = len(captions)
    kinds = different_of_kinds(captions, tagger_of(language))
    return CaptionNumbers(name, language, n, length / n, len(pairs) / n, len(triples) / n, kinds)


def language_of(captions: list[str]) -> Language:
    """By which script has more of the letters."""
    text = "".join(captions[:1000])
    chinese = sum("\u4e00" <= character <= "\u9fff" for character in text)
    latin = sum(character.isascii() and character.isalpha() for character in text)
    return "chinese" if chinese > latin / 5 else "english"  # a Chinese word is about five letters


# ---------------------------------------------------------------------------------------- taggers


def different_of_kinds(captions: list[str], tagger: Tagger | None) -> dict[str, float | None]:
    """Different nouns, verbs and adjectives, for each caption."""
    if tagger is None:
        return dict.fromkeys(KINDS)
    found: dict[str, set[str]] = {kind: set() for kind in KINDS}
    for caption in captions:
        for word, kind in tagger(caption):
            if kind:
                found[kind].add(word.lower())
    return {kind: len(different) / len(captions) for kind, different in found.items()}


def tagger_of(language: Language) -> Tagger | None:
    """None where its package is not installed."""
    package = "jieba" if language == "chinese" else "textblob"
    if find_spec(package) is None:
        return None
    return chinese_tagger() if language == "chinese" else english_tagger()


def english_tagger() -> Tagger:
    from textblob.en.taggers import PatternTagger

    tagger = PatternTagger()

    def tag(text: str) -> Iterable[tuple[str, str]]:
        for word, tag in tagger.tag(text):
            yield word, ENGLISH_TAGS.get(tag[:2], "")

    return tag


def chinese_tagger() -> Tagger:
    import jieba
    import jieba.posseg

    # It greets on stderr
    jieba.setLogLevel("ERROR")

    def tag(text: str) -> Iterable[tuple[str, str]]:
        for word in jieba.posseg.cut(text):
            yield word.word, CHINESE_TAGS.get(word.flag[:1], "")

    return tag


# --------------------------------------------------------------------------------------- command


@dataclass
class StatisticsOptions:
    """Length and variety of one or several sets of captions, as a table."""

    data: tuple[Path, ...]  # files or folders of captions
    samples: int = 10_000  # captions drawn of each; 0: all
    language: Language = "auto"
    seed: int = 0


def print_statistics(options: StatisticsOptions) -> None:
    rows = []
    for path in options.data:
        captions = captions_of(path, options.samples, options.seed)
        rows.append(measure_captions(printable(path.name), captions, options.language))

    cells = [row.row() for row in rows]
    print("\n".join(markdown(HEAD, *cells, align="ll" + 7 * "r")))
    if any(None in row.kinds.values() for row in rows):
        print("\nno tagger for the last columns: pip install --no-deps -r requirements/words.txt")
    if len({row.captions for row in rows}) > 1:
        print("\nsets of different size do not compare: give --samples the smallest")


def captions_of(path: Path, samples: int, seed: int) -> list[str]:
    """Captions of a file, drawn without repetition; records that cannot be read are left out, and said."""
    folder = Folder(path)
    indices = range(len(folder))
    if samples and samples < len(folder):
        indices = sorted(random.Random(seed).sample(indices, samples))

    captions = []
    faults: Counter[str] = Counter()
    for index in indices:
        sample = folder[index]
        if isinstance(sample, BadSample):
            faults[sample.reason] += 1
        else:
            captions.append(caption_in(sample))
    for reason, number in faults.items():
        print(f"{printable(path.name)}: {number} records left out, {printable(reason)}")
    return captions


if __name__ == "__main__":
    command(print_statistics)
