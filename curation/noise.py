"""Captions that are wrong in a known way: what judges are trained on, and measured by.

What it teaches: whoever wants to know whether a judge finds bad captions needs bad captions of which
somebody knows how bad they are. In the drawn world that is a rule: a scene says all of itself in words,
so a caption can be compared with them, word by word.

    scene   northwest red circle, southeast blue cross                      richness  alignment
    attribute  northwest green circle, southeast blue cross                     5         2
    object     northwest red circle, southeast blue cross, northeast red cross  5         2
    omission   northwest red circle                                             3         3
    gibberish  wnhrtotse dre ccleri                                             1         1
    short      circle                                                           2         2
    mismatch   text A1X                                                         3         1

    python -m curation.noise --out runs/noisy.jsonl --samples 20000 --rate 0.18

Both scores go from 1 to 5; below 3 a caption is to be dropped (SAIL-VL2, section 3.1). The rule, ours:

    richness    how many details (words that say something, characters of a string) the caption has for
                each that the picture shows, right or wrong: all 5, three quarters 4, half 3, fewer 2, none 1
    alignment   the same of the details in true phrases, as long as nothing false is said; of a caption
                with false phrases 2 if as many are true, else 1; 1 if nothing true is said

Simplified: a phrase is true if one thing of the picture has all of its words, so a wrong color and an
invented thing weigh the same. Videos are left out: their judges look at frames (SAIL-VL2, section 4.1).
"""

import random
from collections import Counter
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import Callable, Iterator, Sequence

from curation.rows import RowWriter
from data.sample import Message, Sample
from data.world import CHARACTERS, COLORS, LEVELS, PLACES, SHAPES, sample
from infra.cli import command

DIGITS = tuple("0123456789")
NAMES = ("text", "sum", "dots")  # what kind of picture it is, where it is not made of things
KNOWN = {*PLACES, *COLORS, *SHAPES, *DIGITS, *NAMES, "+", "-"}

# Words that can stand for one another, so that a caption stays one of this world.
ALIKE = (PLACES, tuple(COLORS), SHAPES, DIGITS, ("+", "-"), tuple(CHARACTERS))

# ------------------------------------------------------------------------------------------ truth


def phrases_of(caption: str) -> list[tuple[str, ...]]:
    """The details of each phrase of a caption, in its words' order; a phrase without any is left out."""
    found = [details_of(phrase) for phrase in caption.split(",")]
    return [details for details in found if details]


def details_of(phrase: str) -> tuple[str, ...]:
    """The words that say something about a picture of this world; of a string, its characters."""
    details: list[str] = []
    for word in phrase.split():
        if details[:1] == ["text"] and set(word) <= set(CHARACTERS):
            details += word
        elif word in KNOWN:
            details.append(word)
    return tuple(details)


def true_details(caption: str, words: str) -> tuple[int, int, int]:
    """Of a caption of a scene: details in true phrases, true phrases, false phrases.

    Every thing of the scene makes one phrase true: said twice, the second one is false.
    """
    things = [Counter(thing) for thing in phrases_of(words)]
    details = 0
    true = 0
    false = 0
    for phrase in phrases_of(caption):
        meant = thing_with(phrase, things)
        if meant is None:
            false += 1
            continue
        things.remove(meant)
        true += 1
        details += len(phrase)
    return details, true, false


def thing_with(details: Sequence[str], things: list[Counter]) -> Counter | None:
    """The first thing that has all of these details; None for none, and for no details."""
    wanted = Counter(details)
    if not wanted:
        return None
    return next((thing for thing in things if wanted <= thing), None)


def number_of_details(caption: str) -> int:
    """A phrase that is said again says nothing more."""
    return sum(map(len, set(phrases_of(caption))))


def score_of_share(said: int, shown: int) -> int:
    """1 to 5 for so many details of so many."""
    if said >= shown:
        return 5
    if said >= 0.75 * shown:
        return 4
    if said >= 0.5 * shown:
        return 3
    return 2 if said else 1


def richness(caption: str, words: str) -> int:
    """Visual information richness, 1 to 5, of a caption of the scene that `words` describe."""
    return score_of_share(number_of_details(caption), number_of_details(words))


def alignment(caption: str, words: str) -> int:
    """Image-text alignment, 1 to 5."""
    details, true, false = true_details(caption, words)
    if not false:
        return score_of_share(details, number_of_details(words))
    return 2 if true >= false else 1


# ------------------------------------------------------------------------------------------ chain


def check_of(caption: str, words: str) -> str:
    """The scene's words, then the caption's, with a `no` where a phrase begins to be false.

    northwest red circle; northwest green no circle: what a judge can say before it answers.
    """
    things = [Counter(thing) for thing in phrases_of(words)]
    checked = []
    for phrase in caption.split(","):
        said = phrase.split()
        meant = thing_with(details_of(phrase), things)
        if meant is None:
            said.insert(first_false(said, things), "no")
        else:
            things.remove(meant)
        checked.append(" ".join(said))
    return f"{words}; {', '.join(checked)}"


def first_false(said: list[str], things: list[Counter]) -> int:
    """After how many of its words a phrase fits no thing any more."""
    ends = range(1, len(said) + 1)
    return next(end for end in ends if not thing_with(details_of(" ".join(said[:end])), things))


# ------------------------------------------------------------------------------------------ noise


def wrong_attribute(words: str, rng: random.Random) -> str:
    """One word, or one character of a string, is another of its kind, such that its phrase is false."""
    while True:
        phrases = words.split(", ")
        place = rng.randrange(len(phrases))
        phrases[place] = with_other_word(phrases[place], rng)
        caption = ", ".join(phrases)
        if alignment(caption, words) < 3:
            return caption


def with_other_word(phrase: str, rng: random.Random) -> str:
    """A phrase, one of whose words (not the kind of picture) became another of the same sort."""
    words = phrase.split()
    places = [i for i, word in enumerate(words) if word not in NAMES]
    place = rng.choice(places)
    if words[0] == "text":
        # A string: one of its characters
        characters = list(words[place])
        i = rng.randrange(len(characters))
        characters[i] = rng.choice(CHARACTERS.replace(characters[i], ""))
        words[place] = "".join(characters)
        return " ".join(words)

    # A count or a height is never nothing
    alike = next(group for group in ALIKE if words[place] in group)
    if alike is DIGITS and words[0] != "sum":
        alike = [str(n) for n in range(1, LEVELS + 1)]
    words[place] = rng.choice([word for word in alike if word != words[place]])
    return " ".join(words)


def hallucinated_object(words: str, rng: random.Random) -> str:
    """One more thing that is not there; of a chart one more bar."""
    phrases = words.split(", ")
    taken = {word for phrase in phrases for word in phrase.split()}

    # Where nothing is, if there is such a place
    free = [place for place in PLACES if place not in taken] or list(PLACES)
    thing = (rng.choice(free), rng.choice(list(COLORS)), rng.choice(SHAPES))
    if is_chart(words):
        missing = [color for color in COLORS if color not in taken]
        thing = (rng.choice(missing), str(rng.randint(1, LEVELS)))
    phrase = " ".join(thing)
    if phrase in phrases:
        return hallucinated_object(words, rng)
    phrases.insert(rng.randint(0, len(phrases)), phrase)
    return ", ".join(phrases)


def is_chart(words: str) -> bool:
    """Bars are told by a color and a height."""
    return len(details_of(words.split(", ")[0])) == 2


def omission(words: str, rng: random.Random) -> str:
    """Some of the details are gone: whole things, or words here and there; one at least stays."""
    things = words.split(", ")
    if len(things) > 1 and rng.random() < 0.5:
        return ", ".join(some_of(things, rng))

    # Characters are no caption without the word that says what they are
    details = numbered_details(words)
    if words.startswith("text"):
        return said_again([details[0], *some_of(details[1:], rng)])
    return said_again(some_of(details, rng))


def some_of(pieces: list, rng: random.Random) -> list:
    """At least one of them and not all, in their order."""
    kept = rng.sample(range(len(pieces)), rng.randrange(1, len(pieces)))
    return [pieces[i] for i in sorted(kept)]


def numbered_details(words: str) -> list[tuple[int, str]]:
    """Every detail with the number of its phrase."""
    details = []
    for number, phrase in enumerate(words.split(", ")):
        details += [(number, word) for word in details_of(phrase)]
    return details


def said_again(details: list[tuple[int, str]]) -> str:
    """Details as a caption: those of a phrase together, characters of a string side by side."""
    phrases: dict[int, list[str]] = {}
    for number, word in details:
        phrases.setdefault(number, []).append(word)
    said = []
    for words in phrases.values():
        is_string = words[0] == "text"
        said.append(f"text {''.join(words[1:])}" if is_string else " ".join(words))
    return ", ".join(said)


def gibberish(words: str, rng: random.Random) -> str:
    """The letters of each word in another order, such that no word of the world comes out."""
    while True:
        mixed = ["".join(rng.sample(word, len(word))) for word in words.split()]
        letters = [word for word in mixed if word.isalpha()] or [mixed[0][::-1]]
        caption = " ".join(letters)
        if not phrases_of(caption):
            return caption


def too_short(words: str, rng: random.Random) -> str:
    """A single detail, or only that it is a picture."""
    details = [word for _, word in numbered_details(words)]
    if words.startswith("text"):
        details = details[:1]
    return rng.choice([*details, "picture"])


# What can become of a caption, but for another sample's, which needs another sample.
SPOILED: dict[str, Callable[[str, random.Random], str]] = {
    "attribute": wrong_attribute,
    "object": hallucinated_object,
    "omission": omission,
    "gibberish": gibberish,
    "short": too_short,
}
NOISE = (*SPOILED, "mismatch")

# ---------------------------------------------------------------------------------------- samples


def pictured(index: int, seed: int, test: bool) -> Sample | None:
    """A scene with its caption; None for a video."""
    drawn = sample(index, seed, {"caption": 1.0}, test, turns=1)
    return None if drawn.origin.startswith("world/video/") else drawn


def noisy(drawn: Sample, noise: str, caption: str) -> Sample:
    """A sample with this caption in the place of its own, and what it should score in its facts."""
    words = drawn.facts["words"]
    facts = {
        "words": words,
        "noise": noise,
        "vir": richness(caption, words),
        "ita": alignment(caption, words),
        "chain": check_of(caption, words),
    }
    answer = Message("assistant", (caption,))
    return replace(drawn, messages=(*drawn.messages[:-1], answer), facts=facts)


def noisy_sample(
    index: int, seed: int, rate: float, kinds: tuple[str, ...] = NOISE, test: bool = False
) -> Sample | None:
    """Sample `index` of the world; with probability `rate` its caption is spoiled. None for a video."""
    drawn = pictured(index, seed, test)
    if drawn is None:
        return None

    # As it is, or one kind of noise
    rng = random.Random(f"{seed}/{index}/noise")
    words = drawn.facts["words"]
    if rng.random() >= rate:
        return noisy(drawn, "none", words)
    kind = rng.choice(kinds)
    if kind != "mismatch":
        return noisy(drawn, kind, SPOILED[kind](words, rng))

    # Another one's caption, of the same side, that does not happen to fit
    while True:
        other = pictured(rng.randrange(1 << 30), seed, test)
        if other and alignment(other.facts["words"], words) < 3:
            return noisy(drawn, kind, other.facts["words"])


def noisy_samples(
    seed: int, rate: float, kinds: tuple[str, ...] = NOISE, test: bool = False
) -> Iterator[Sample]:
    """Endless, without videos."""
    for index in count():
        found = noisy_sample(index, seed, rate, kinds, test)
        if found is not None:
            yield found


# ---------------------------------------------------------------------------------------- command


@dataclass
class NoiseOptions:
    """Write captioned pictures of the drawn world, some captions spoiled, with what they should score."""

    out: Path  # JSONL, in our own format
    samples: int = 2000
    rate: float = 0.18  # share of spoiled captions; the paper found 15 to 20 % scored below 3
    kinds: tuple[str, ...] = NOISE  # of noise, equally often; named twice, twice as often
    held_out: bool = False  # scenes of the held-out side
    seed: int = 0


def write_noisy(options: NoiseOptions) -> None:
    """Raises ValueError for a rate that is no share, and for an unknown kind of noise."""
    if not 0 <= options.rate <= 1:
        raise ValueError("--rate is a share, between 0 and 1")
    unknown = sorted(set(options.kinds) - set(NOISE))
    if unknown or not options.kinds:
        raise ValueError(f"--kinds {' '.join(unknown)}: choose from {', '.join(NOISE)}")

    # Written and counted
    kinds = Counter()
    low = Counter()
    found = noisy_samples(options.seed, options.rate, options.kinds, options.held_out)
    with RowWriter(options.out) as rows:
        for spoiled in islice(found, options.samples):
            rows.write(spoiled)
            kinds[spoiled.facts["noise"]] += 1
            for dimension in ("vir", "ita"):
                low[dimension] += spoiled.facts[dimension] < 3
    counts = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common())
    print(f"wrote {options.out}: {counts}; below 3: {low['vir']} richness, {low['ita']} alignment")


if __name__ == "__main__":
    command(write_noisy)
