"""Caption2QA: a caption holds the answers to many questions; a language model writes both down.

What it teaches: a good caption costs one look at the picture, and questions about it cost none: whoever
writes them reads the caption alone. That is how a set of captions becomes a larger set of questions. It is
also how nonsense is made in quantity, so every pair is checked:

    caption --asked for N pairs as JSON--> pairs --form, doubles--> --leaks, mentions--> --answerable?--> row
                                                       "what colour is the red car?"         |
                                                       "what does the caption say?"          answer's words
                                                                                             in the caption,
                                                                                             else ask again

    python -m curation.caption2qa --data captions.jsonl --out questions.jsonl --annotator.url ... --count 5

What each check wants:
    form        a question and an answer, both texts of sensible length
    double      no question twice in a sample, in the same or nearly the same words
    mentions    nobody speaks of a caption or description: the model will see the picture alone
    leak        the question does not hold all words of its answer
    answerable  the answer's words stand in the caption; a yes, a no, a count or other words for it do not, so
                the annotator is asked that question again with the caption alone, and must say the same
    look        (--look) asked of the picture, the annotator says the same: our own addition
    alike       over the whole set, the same question with the same answer stands at most --alike times

A model that cannot write JSON still can answer: `--templates FILE` makes the questions from patterns over the
caption (prompts/toy/templates.tsv), and the annotator answers them from the caption alone.

The rows hold the questions as turns of one conversation. The caption is no turn of it, as it would give
all answers away; it stays in the facts.

Source: SAIL-VL2's released technical report: about 80M captions to 180M samples, several diverse questions
a caption, answers from its text. Not published: prompts and checks; all of them are ours.
"""

import re
from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from string import Template
from typing import Iterable, Sequence

from curation.annotators import AnnotatorOptions, open_annotator
from curation.balance import words
from curation.captioner import MARKED, caption_in, newly_said, shown_pictures
from curation.pipeline import Item, PipelineOptions
from curation.questions import walk_and_report
from curation.requests import Annotator, Request, Response, generator_of, json_in
from data.sample import Message, Sample
from graders import same_answer, yes_or_no
from infra.cli import command
from scale import parallel

LONGEST_QUESTION = 400  # characters
LONGEST_ANSWER = 1000
NEARLY = 0.8  # shared words, of all words of two questions: above it they are the same one

MENTION = re.compile(
    r"\b(caption|description|described|alt[- ]?text|paragraph|passage|(in|by|to) the text)\b"
    r"|描述|图注|说明文字|文中|上文|根据文字",
    re.IGNORECASE,
)
UNANSWERABLE = re.compile(r"\W*(unanswerable|无法回答|不知道)", re.IGNORECASE)
EITHER_OR = re.compile(r"\bor\b|还是", re.IGNORECASE)
EMPTY_WORDS = frozenset(
    "a an the is are was were be it its there this that these those of in on at to and with by for from "
    "的 了 是 在 有".split()
)
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()

Pairs = list[tuple[str, str]]  # question, answer


# ------------------------------------------------------------------------------------------ words


def content(text: str) -> list[str]:
    """The words that carry a text: no signs, no articles; numbers as digits, plurals without their s."""
    found = []
    for word in words(text):
        if word in EMPTY_WORDS or not word[0].isalnum():
            continue
        if word in NUMBERS:
            word = str(NUMBERS.index(word))
        if len(word) > 3 and word.endswith("s") and not word.endswith("ss"):
            word = word[:-1]
        found.append(word)
    return found


def says_the_same(one: str, other: str) -> bool:
    """Equal for a grader, or the words of the shorter all stand in the longer."""
    if yes_or_no(one) or yes_or_no(other):
        return yes_or_no(one) == yes_or_no(other)
    if same_answer(one, other):
        return True
    short, long = sorted((set(content(one)), set(content(other))), key=len)
    return bool(short) and short <= long


def stands_in(answer: str, caption: str) -> bool:
    """Whether all the words of an answer stand in the caption; a yes or a no never does."""
    wanted = content(answer)
    if not wanted or yes_or_no(answer):
        return False
    return set(wanted) <= set(content(caption))


def fault_of_pair(question: str, answer: str, earlier: Iterable[str]) -> str:
    """What is wrong with a pair by itself, "" for nothing."""
    if MARKED.search(question) or MARKED.search(answer):
        return "holds markup"
    if MENTION.search(question) or MENTION.search(answer):
        return "mentions the caption"

    # Given away: all that the answer says is said already
    asked = set(content(question))
    exempt = yes_or_no(answer) or EITHER_OR.search(question)
    if not exempt and set(content(answer)) <= asked:
        return "gives its answer away"

    # Asked before, in as good as the same words
    for other in earlier:
        known = set(content(other))
        if len(asked & known) > NEARLY * len(asked | known):
            return "asked twice"
    return ""


# ----------------------------------------------------------------------------------- pairs of a sample


def pairs_of(sample: Sample) -> Pairs:
    """The pairs that a sample has so far: facts.pairs."""
    return [(question, answer) for question, answer in sample.facts.get("pairs", [])]


def pairs_in(text: str, most: int) -> tuple[Pairs, int]:
    """The usable pairs of a reply, at most so many, and how many were no pairs."""
    found = json_in(text)
    if isinstance(found, dict):
        lists = [value for value in found.values() if isinstance(value, list)]
        found = lists[0] if lists else [found]
    if not isinstance(found, list):
        return [], 0

    pairs = []
    malformed = 0
    for entry in found[:most]:
        question = entry.get("question") if isinstance(entry, dict) else None
        answer = entry.get("answer") if isinstance(entry, dict) else None
        if usable_text(question, LONGEST_QUESTION) and usable_text(answer, LONGEST_ANSWER):
            pairs.append((question.strip(), answer.strip()))
        else:
            malformed += 1
    return pairs, malformed


def usable_text(value: object, longest: int) -> bool:
    """A text with something in it, and no half of a surrogate, which no file could hold."""
    if not isinstance(value, str) or not value.strip() or len(value) > longest:
        return False
    return not any(0xD800 <= ord(character) <= 0xDFFF for character in value)


class OverPairs:
    """What the steps over pairs share.

    needed: a sample without any pair left is dropped; else it stays, with its caption alone.
    """

    name: str

    def __init__(self, needed: bool = True):
        self.needed = needed

    def drop_lost(self, item: Item, responses: list[Response]) -> bool:
        """Drops a sample that a server left without one of its answers, for the next run to ask again."""
        lost = [response for response in responses if response.lost]
        if lost:
            item.drop(self.name, lost[0].fault)
        return bool(lost)

    def mark(
        self, item: Item, pairs: Pairs, out: Counter[str], why: str = "", **measured: str
    ) -> None:
        """The sample goes on with these pairs; `out` counts why others went."""
        # In words: 3 of 5, 1 asked twice, 1 mentions the caption
        came = len(pairs) + out.total()
        counted = [f"{n} {reason}" for reason, n in sorted(out.items())]
        said = ", ".join([f"{len(pairs)} of {came}", *counted, *([why] if why else [])])
        if self.needed and not pairs:
            item.drop(self.name, f"no question left: {said}")
            return

        rejected = Counter(item.sample.facts.get("rejected", {})) + out
        facts = measured | {"pairs": [list(pair) for pair in pairs], "rejected": dict(rejected)}
        if pairs == pairs_of(item.sample):
            item.keep(self.name, said, **facts)
        else:
            item.change(self.name, item.sample, said, **facts)


# ----------------------------------------------------------------------------------- asking for pairs


class AskQuestions(OverPairs):
    """`count` pairs a caption, of an annotator that writes JSON. It sees the caption alone."""

    name = "questions"

    def __init__(self, annotator: Annotator, count: int, needed: bool = True):
        super().__init__(needed)
        self.annotator = annotator
        self.count = count

    def __call__(self, items: list[Item]) -> None:
        requests = []
        for item in items:
            fields = {"caption": caption_in(item.sample), "count": str(self.count)}
            requests.append(Request("caption2qa", fields, about=item.sample))

        # What can be read of the replies; what nobody said is asked by the next run
        responses = self.annotator.annotate(requests)
        for item, request, response in zip(items, requests, responses, strict=True):
            if response.lost:
                item.drop(self.name, response.fault)
                continue
            pairs, malformed = pairs_in(response.text or "", self.count)
            out = Counter({"malformed": malformed} if malformed else {})
            nothing = "" if pairs else response.fault or "the reply holds no pairs"
            self.mark(item, pairs, out, nothing, caption=request.fields["caption"])


class TemplateQuestions(OverPairs):
    """Questions from patterns over the caption, answered from the caption by a model without JSON.

    templates: a file of lines `pattern <tab> question`; a pattern's named groups fill the question's
    $names. A question that a line makes twice of one caption ("where is the dog?" of two dogs) has no
    one answer, and is not asked. Of the others `count` are drawn, from as many lines as there are.
    Raises ValueError for a line that is none.
    """

    name = "questions"

    def __init__(
        self, annotator: Annotator, templates: Path, count: int, seed: int = 0, needed: bool = True
    ):
        super().__init__(needed)
        self.annotator = annotator
        self.templates = read_templates(templates)
        self.count = count
        self.seed = seed

    def __call__(self, items: list[Item]) -> None:
        # All questions about all captions at once
        requests = []
        asked = []
        for item in items:
            caption = caption_in(item.sample)
            questions = self.questions_about(caption, item.index)
            asked.append((caption, questions))
            for question in questions:
                fields = {"caption": caption, "question": question}
                requests.append(Request("answer_from_caption", fields, about=item.sample))
        responses = iter(self.annotator.annotate(requests))

        # Each sample takes its own answers
        for item, (caption, questions) in zip(items, asked, strict=True):
            said = list(islice(responses, len(questions)))
            if self.drop_lost(item, said):
                continue
            pairs = [
                (question, response.text.strip())
                for question, response in zip(questions, said, strict=True)
                if is_answer(response.text)
            ]
            silent = len(questions) - len(pairs)
            out = Counter({"without an answer": silent} if silent else {})
            self.mark(item, pairs, out, caption=caption)

    def questions_about(self, caption: str, index: int) -> list[str]:
        """From each line in turn, in an order of the sample's own; no question twice."""
        rng = generator_of(self.seed, index, self.name)
        queues = []
        for pattern, question in self.templates:
            found = Counter(question.substitute(m.groupdict()) for m in pattern.finditer(caption))
            clear = [asked for asked, times in found.items() if times == 1]
            rng.shuffle(clear)
            queues.append(clear)
        rng.shuffle(queues)

        chosen: list[str] = []
        while len(chosen) < self.count and any(queues):
            for queue in queues:
                if queue and len(chosen) < self.count:
                    chosen.append(queue.pop())
        return list(dict.fromkeys(chosen))


def is_answer(text: str | None) -> bool:
    return usable_text(text, LONGEST_ANSWER) and not UNANSWERABLE.match(text)


def read_templates(path: Path) -> list[tuple[re.Pattern, Template]]:
    templates = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        pattern, tab, question = line.partition("\t")
        try:
            compiled = re.compile(pattern)
            Template(question).substitute(dict.fromkeys(compiled.groupindex, ""))
        except (re.error, ValueError, KeyError) as error:
            raise ValueError(f"{path}:{number}: {type(error).__name__} {error}") from None
        if not tab or not question.strip():
            raise ValueError(f"{path}:{number}: a line is `pattern <tab> question`")
        templates.append((compiled, Template(question)))
    return templates


# ------------------------------------------------------------------------------------ checking pairs


class CheckPairs(OverPairs):
    """Drops pairs that leak, mention the caption, stand twice, or cannot be answered from the caption.

    verifier: who is asked again where words cannot tell; None: such pairs go.
    """

    name = "check"

    def __init__(self, verifier: Annotator | None, needed: bool = True):
        super().__init__(needed)
        self.verifier = verifier

    def __call__(self, items: list[Item]) -> None:
        sound = [sound_pairs(item.sample) for item in items]

        # Where words cannot tell, once more
        doubtful = []
        requests = []
        for item, (pairs, _) in zip(items, sound, strict=True):
            asked = [again(item.sample, pair) for pair in pairs if in_doubt(item.sample, pair)]
            doubtful.append(len(asked))
            requests += asked
        responses = iter([Response(None)] * len(requests))
        if self.verifier is not None and requests:
            responses = iter(self.verifier.annotate(requests))

        for item, (pairs, out), number in zip(items, sound, doubtful, strict=True):
            said = list(islice(responses, number))
            if not self.drop_lost(item, said):
                self.mark(item, answerable(item.sample, pairs, said, out), out)


def sound_pairs(sample: Sample) -> tuple[Pairs, Counter[str]]:
    """The pairs of a sample that are well formed by themselves, and why the others are not."""
    pairs: Pairs = []
    out: Counter[str] = Counter()
    for question, answer in pairs_of(sample):
        fault = fault_of_pair(question, answer, [earlier for earlier, _ in pairs])
        if fault:
            out[fault] += 1
        else:
            pairs.append((question, answer))
    return pairs, out


def in_doubt(sample: Sample, pair: tuple[str, str]) -> bool:
    """Whether the caption's words do not show that the answer is in it."""
    return not stands_in(pair[1], caption_in(sample))


def again(sample: Sample, pair: tuple[str, str]) -> Request:
    fields = {"caption": caption_in(sample), "question": pair[0]}
    return Request("answer_from_caption", fields, about=sample)


def answerable(sample: Sample, pairs: Pairs, said: Sequence[Response], out: Counter[str]) -> Pairs:
    """The pairs that are in no doubt, and those that were answered the same once more (`said`)."""
    kept = []
    replies = iter(said)
    for pair in pairs:
        if in_doubt(sample, pair):
            reply = next(replies)
            if not is_answer(reply.text) or not says_the_same(reply.text, pair[1]):
                out["not in the caption"] += 1
                continue
        kept.append(pair)
    return kept


class LookAgain(OverPairs):
    """Asks the picture: pairs stay whose answer the annotator also gives when it looks.

    least: share of the pairs that must agree, or the whole sample goes: its caption is of something else.
    """

    name = "look"

    def __init__(self, annotator: Annotator, least: float = 0.0, needed: bool = True):
        super().__init__(needed)
        self.annotator = annotator
        self.least = least

    def __call__(self, items: list[Item]) -> None:
        requests = []
        for item in items:
            pictures = shown_pictures(item.sample)
            for question, _ in pairs_of(item.sample):
                fields = {"question": question}
                requests.append(Request("answer_from_picture", fields, pictures, item.sample))
        responses = iter(self.annotator.annotate(requests))

        for item in items:
            pairs = pairs_of(item.sample)
            said = list(islice(responses, len(pairs)))
            if self.drop_lost(item, said):
                continue
            agreeing = []
            for (question, answer), response in zip(pairs, said, strict=True):
                text = response.text
                if text is not None and says_the_same(text, answer):
                    agreeing.append((question, answer))
            if pairs and len(agreeing) < self.least * len(pairs):
                said = f"{len(agreeing)} of {len(pairs)} answers are the same"
                item.drop(self.name, f"picture and caption disagree: {said}")
                continue
            wrong = len(pairs) - len(agreeing)
            self.mark(item, agreeing, Counter({"not in the picture": wrong} if wrong else {}))


# ------------------------------------------------------------------------------------ over the whole set


class AlikePairs(OverPairs):
    """At most `most` samples have the same question with the same answer; the first ones keep it."""

    name = "alike"

    def __init__(self, most: int, needed: bool = True):
        super().__init__(needed)
        if most < 1:
            raise ValueError("--alike must be positive")
        self.most = most

    def __call__(self, items: list[Item]) -> None:
        seen: Counter[tuple] = Counter()
        for item in items:
            kept = []
            pairs = pairs_of(item.sample)
            for question, answer in pairs:
                key = (tuple(words(question)), tuple(words(answer)))
                seen[key] += 1
                if seen[key] <= self.most:
                    kept.append((question, answer))
            gone = len(pairs) - len(kept)
            self.mark(item, kept, Counter({"too many alike": gone} if gone else {}))


class PairsAsTurns:
    """The row: one conversation about the picture, without the caption."""

    name = "turns"

    def __call__(self, items: list[Item]) -> None:
        for item in items:
            pairs = pairs_of(item.sample)
            item.change(self.name, as_conversation(item.sample, pairs), f"{len(pairs)} turns")


def as_conversation(sample: Sample, pairs: Sequence[tuple[str, str]]) -> Sample:
    """The pictures with the first question, the others after it; grading asks the last."""
    first, answer = pairs[0]
    opening = newly_said(sample, first, answer)
    messages = list(opening.messages)
    for question, answer in pairs[1:]:
        messages += [Message("user", (question,)), Message("assistant", (answer,))]
    facts = {key: value for key, value in opening.facts.items() if key != "pairs"}
    last = {"question": pairs[-1][0], "answer": pairs[-1][1]}
    return replace(opening, messages=tuple(messages), facts=facts | last)


# --------------------------------------------------------------------------------------- command


@dataclass
class QuestionOptions:
    """How questions are made of captions."""

    count: int = 5  # questions that are asked for, a caption
    templates: Path | None = None  # patterns and questions, for an annotator that writes no JSON
    # ask again where the caption's words cannot tell whether an answer is in it
    verify: bool = True
    look: bool = False  # ask the picture too; pairs stay where it says the same
    least_agreement: float = 0.0  # with --look: a sample with a smaller share of such pairs goes
    alike: int = 100  # times that the same question with the same answer may stand in the set


@dataclass
class Caption2QAOptions(PipelineOptions):
    """Captions to questions and answers about the same pictures."""

    annotator: AnnotatorOptions = field(default_factory=AnnotatorOptions)
    questions: QuestionOptions = field(default_factory=QuestionOptions)


def question_steps(
    options: QuestionOptions, annotator: Annotator, seed: int, needed: bool
) -> list[OverPairs]:
    """The steps over chunks, from captions to checked pairs."""
    if options.count < 1:
        raise ValueError("--questions.count must be positive")
    if not 0 <= options.least_agreement <= 1:
        raise ValueError("--questions.least-agreement is a share, between 0 and 1")
    if options.least_agreement and not options.look:
        raise ValueError("--questions.least-agreement is of what --questions.look says: give both")
    steps: list[OverPairs] = []
    if options.templates:
        steps.append(TemplateQuestions(annotator, options.templates, options.count, seed, needed))
    else:
        steps.append(AskQuestions(annotator, options.count, needed))
    steps.append(CheckPairs(annotator if options.verify else None, needed))
    if options.look:
        steps.append(LookAgain(annotator, options.least_agreement, needed))
    return steps


def write_questions(options: Caption2QAOptions) -> None:
    """From files to files."""
    ranks = parallel.start()
    annotator = open_annotator(options.annotator, options.seed)
    steps = question_steps(options.questions, annotator, options.seed, needed=True)
    over_all = [AlikePairs(options.questions.alike), PairsAsTurns()]
    walk_and_report(options, ranks, steps, over_all, annotator)


if __name__ == "__main__":
    command(write_questions)
