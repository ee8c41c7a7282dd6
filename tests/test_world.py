"""The drawn world is a constant: every sample of every mixture is what it was, word and pixel."""

import hashlib
from collections import Counter

import PIL
import pytest
from PIL import Image

from data import world

# What the samples of one commit were, by mixture: words (any Pillow) and pixels (Pillow draws the letters).
EXPECTED = {
    "text": ("c472765e31703a74", "e4a6a0577479b2b4"),
    "every": ("2dc3b87f6a76aa7b", "8b1fe591b9f98b15"),
    "held out": ("829f745afad5905a", "2d7a938569b4bffa"),
    "uneven": ("2097490c8fae3941", "5ceda8d70e735f9c"),
    "described boxes": ("49ef1d47a6c1a710", "e4a6a0577479b2b4"),
    "caption": ("5ba7c24a6c59324b", "1513c5069167d7f3"),
    "listing": ("6c97932316c71723", "e48f22d81beee4c3"),
    "attributes": ("4083c09635853427", "911fcb9fb6f7505a"),
    "spatial": ("50237e05bc3b534a", "837cb4162695deda"),
    "counting": ("623d4c1d58234a79", "0f3ee5ce48e6b54a"),
    "grounding": ("73f60ca650151209", "0b908962e676dc76"),
    "reading": ("aa383a901a27032d", "dec779ff7437812a"),
    "charts": ("33c0f17fd5362b4d", "c3f223f7ca3c009b"),
    "arithmetic": ("90b6c310ead96151", "026682ee9d6494a8"),
    "odd": ("27d2260d01c512d6", "52d8d3f9a05ca942"),
    "video": ("b6b68025e33ebf68", "883c38ad98cea0b6"),
    "corpus": "f0460879da07dca4",
}
DRAWN_WITH = "13.0.0"

SINGLES = (
    "caption",
    "listing",
    "attributes",
    "spatial",
    "counting",
    "grounding",
    "reading",
    "charts",
)
SINGLES += ("arithmetic", "odd", "video")
MIXTURES = {
    "text": ({"text": 1.0}, False, 0),
    "every": (dict.fromkeys(SINGLES, 1.0) | {"text": 0.2}, False, 0),
    "held out": (dict.fromkeys(SINGLES, 1.0) | {"text": 0.2}, True, 1),
    "uneven": (
        {"text": 0.1, "caption": 1.0, "charts": 6.0, "grounding": 4.0, "odd": 0.4},
        False,
        0,
    ),
    "described boxes": ({"text": 1.0, "grounding": 1.0}, False, 2),
} | {family: ({family: 1.0}, False, 1) for family in SINGLES}


def fingerprints(mixture, test, turns, n):
    """Hashes of n samples: of all that is text, and of all pixels."""
    said, seen = hashlib.blake2b(digest_size=8), hashlib.blake2b(digest_size=8)
    for i in range(n):
        s = world.sample(i, 7 * (i % 3), mixture, test, turns)
        facts = [s.facts[key] for key in ("answer", "family", "words", "chain")]
        said.update(repr((s.task, s.origin, s.root, s.max_tiles, facts)).encode())
        for message in s.messages:
            said.update(repr((message.role, message.think, message.learn)).encode())
            for part in message.parts:
                if isinstance(part, Image.Image):
                    seen.update(repr((part.mode, part.size)).encode() + part.tobytes())
                    part = "picture"
                said.update(repr(part).encode())
    return said.hexdigest(), seen.hexdigest()


def count_of(name):
    return 200 if name in SINGLES else 500


@pytest.mark.parametrize("name", MIXTURES)
def test_samples_are_what_they_always_were(name):
    said, seen = fingerprints(*MIXTURES[name], count_of(name))
    assert said == EXPECTED[name][0]
    if PIL.__version__ == DRAWN_WITH:
        assert seen == EXPECTED[name][1]


def test_the_corpus_of_the_tokenizer_is_what_it_always_was():
    text = "\n".join(world.corpus(300, 3))
    assert hashlib.blake2b(text.encode(), digest_size=8).hexdigest() == EXPECTED["corpus"]
    counts = {"objects": 29720, "dots": 74460, "reading": 32000, "chart": 14400, "sum": 620}
    assert world.scene_counts() == counts | {"odd": 2240, "video": 160}


# ----------------------------------------------------------------------------------- the one list


def test_every_family_is_listed_once_and_can_be_asked_where_it_is_said_to_be():
    asked = {family for kind in world.KINDS.values() for family in kind.families}
    assert asked | {"text"} == set(world.FAMILIES)
    for kind in world.KINDS.values():
        for family in kind.families:
            assert callable(getattr(kind, f"ask_{family}"))


def test_what_the_recipes_import_follows_from_the_table():
    assert world.GRADED == tuple(f for f in world.FAMILIES if f != "listing")
    assert world.REASONING == ("counting", "charts", "arithmetic", "odd")
    assert list(world.PHASES) == ["sft1", "sft2", "sft3", "sft4"]
    assert world.PHASES["sft2"] == ("grounding", "reading", "charts")
    taught = [family for phase in world.PHASES.values() for family in phase]
    assert Counter(taught) == Counter(set(world.GRADED) - {"caption", "text"})


def test_the_mixtures_of_pre_training_are_what_they_were():
    captions = {"caption": 1.0, "listing": 1.0, "reading": 0.5}
    assert world.CAPTION == captions
    assert world.UNDERSTANDING == captions | {"grounding": 0.8}
    assert list(world.UNDERSTANDING) == [*captions, "grounding"]  # files are drawn in this order
    rest = {"attributes": 3.0, "spatial": 3.0, "counting": 2.0}
    rest |= {"charts": 2.0, "arithmetic": 2.0, "odd": 1.5}
    assert world.INSTRUCTION == rest
    shown = world.UNDERSTANDING | world.INSTRUCTION
    assert world.EARLIER == {"text": 0.05} | {f: 0.4 * w for f, w in shown.items()}


@pytest.mark.parametrize("family", [f for f in world.FAMILIES if f != "text"])
def test_facts_name_the_question_and_how_to_grade_it(family):
    for i in range(20):
        s = world.sample(i, 0, {family: 1.0}, turns=1)
        assert s.messages[-2].parts[-1].strip() == s.facts["question"]
        wanted = {"caption": "phrases", "grounding": "box"}.get(family)
        assert s.facts.get("grader") == wanted


def test_a_new_family_needs_a_row_and_a_method(monkeypatch):
    """The first of the three places that the module names: after it, it is drawn and graded."""

    class Sized(world.DotScene):
        families = ("caption", "counting", "sizes")

        def ask_sizes(self, rng):
            return world.Turn("sizes", "how large are they?", "small")

    monkeypatch.setitem(world.TABLE, "sizes", world.Family("captions", 1.0))
    monkeypatch.setattr(world, "FAMILIES", tuple(world.TABLE))
    monkeypatch.setitem(world.KINDS, "dots", Sized)
    samples = world.World().held_out("sizes", 5)
    assert {s.facts["answer"] for s in samples} == {"small"}
    assert {s.task for s in samples} == {"sizes"}


def test_the_command_prints_the_sizes_and_draws_a_sheet(tmp_path, capsys):
    world.show_world(world.SheetOptions(tmp_path / "sheet.png"))
    printed = capsys.readouterr().out
    assert all(kind in printed for kind in world.KINDS)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (3 * 12 * 36, 3 * len(world.KINDS) * 36)
