r"""Long chains of thought: from what other data sets call reasoning to what a model should learn of it.

What it teaches: public chains carry instructions to the model that wrote them, come in a dozen spellings and
twice over, and many only say the question or the answer again. Each step has its reason:

    strip     system prompts, hints and requests for a format: they would be learned as part of questions
    form      <think>chain</think>\boxed{answer}, whatever tags, `####` or `the answer is` there were
    guide     where there is no chain, an annotator writes one from question and answer
    overlap   a chain whose words are mostly those of question and answer reasons about nothing
    distill   chain and box must come to the right answer: by rule, and where rules do not settle it, a judge
              (a rule cannot see that a chain invents what it says: `--judge-all` has all of them judged)
    check     one chain, one box, no loops
    -- over the whole set: one for each (pictures, question), and lengths balanced --

    python -m curation.long_cot --data raw.jsonl --out chains.jsonl --annotator.url ...

How it goes on. Chains and RL questions are two uses of the same raw questions:

    raw --long_cot--> chains -----------------------------------------> sft.py long-cot
    raw --free_response--> no letters to guess --difficulty, pass@4--> 0 < pass rate < 1 -> rl.py verifiable
                                                         `--hard-----> solved, but rarely -> rl.py mixed
    questions --chains (the policy's own right ones)------------------> sft.py fusion

Source: SAIL-VL2 sections 4.1 and 4.2.1 (the steps). Not published: prompts, patterns, thresholds; all ours.
Simplified: duplicates are found at the end, after they were asked about; a cache of replies makes them free.
"""

import re
from dataclasses import dataclass, field, replace

from curation.annotators import AnnotatorOptions, open_annotator
from curation.balance import distinct, words
from curation.classes import EvenOver
from curation.free_response import SENTENCE_END
from curation.pipeline import Item, PipelineOptions
from curation.questions import (
    AskStep,
    digest_of_pictures,
    excerpt,
    last_question,
    pictures_in,
    refuses,
    walk_and_report,
    words_in,
)
from curation.requests import Request
from data.encode import (
    chain_of,
    known_grader,
    last_answer,
    question_turns,
    text_of_message,
    truth_of,
)
from data.sample import BadSample, Message, Sample
from graders import BOX, JUDGED, boxed, grade, plain, yes_or_no
from infra.cli import command
from rewards import FEWEST_WORDS, concludes, format_reward
from scale import parallel

LONGEST_BOXED = 200  # characters of an answer that a box can hold
LOOPS_FROM = 40  # words from which a chain can be said to loop
LEAST_DISTINCT = 0.3  # share of different 4-grams, below which it does

# ------------------------------------------------------------------------------------------ strip

# A sentence of a question that says how to answer, and asks nothing.
HINTS = tuple(
    re.compile(pattern, re.I)
    for pattern in (
        # To think, and how
        r"\W*(?:hint|instructions?)\s*[:：]",
        r"\W*(?:please |let(?:'|’)?s |you (?:should|must|first) |first,? )*(?:think|reason)\b"
        r".*\b(?:step[- ]by[- ]step|first|carefully|before)\b",
        r"\W*(?:please |let(?:'|’)?s )?(?:solve|work|explain)\b.*\bstep[- ]by[- ]step\b",
        r"\W*you are (?:a|an|the)\b.*\b(?:assistant|model|expert|ai)\b",
        # What to write
        r"\W*(?:please )?(?:answer|respond|reply)\b"
        r".*\b(?:single word|one word|word or phrase|option(?:'s)? letter|directly)\b",
        r"\W*(?:please )?(?:provide|give|write|put|return|end|conclude|present|enclose|output)\b"
        r".*\b(?:final answer|correct option|option letter|rationale|reasoning|json|boxed)\b",
        r".*\b(?:must be (?:put|enclosed)|(?:with)?in \\boxed)",
        # The same in Chinese
        r"\W*提示\s*[:：]",
        r"\W*(?:请|让我们|我们)?(?:先|首先)?(?:一步一步|一步步|逐步)地?(?:思考|推理|分析|解答)",
        r"\W*请(?:先|首先)?(?:仔细)?(?:思考|推理)",
        r"\W*请?(?:直接|用一个词|用一个单词).*回答",
        r".*答案.*(?:放在|写在|放入).*(?:boxed|框)",
        r"\W*你是(?:一个|一名|一位)?.*(?:助手|模型|专家)",
    )
)
LEAD = re.compile(r"^(\s*)(?:question|问题|题目)\s*[:：]\s*", re.I)


def without_hints(text: str) -> str:
    """A question's words without the sentences that say how to answer it. A question is no hint."""
    # What was never asked for goes
    sentences = SENTENCE_END.split(text)
    kept = []
    for sentence in sentences:
        asks = sentence.strip().endswith(("?", "？"))
        if asks or not any(hint.match(sentence) for hint in HINTS):
            kept.append(sentence)

    # Without the gaps that it leaves; the line break behind a picture stays
    left = "".join(kept)
    if len(kept) < len(sentences):
        lines = [line.strip() for line in left.split("\n")]
        left = "\n" * text.startswith("\n") + "\n".join(line for line in lines if line)
    return LEAD.sub(r"\1", left)


class Stripped:
    """Without system prompts, and without hints in what the user says."""

    name = "stripped"

    def __call__(self, items: list[Item]) -> None:
        for item in items:
            sample = item.sample
            turns = tuple(self.turn(m) for m in sample.messages if m.role != "system")
            stripped = replace(sample, messages=turns)
            try:
                last_question(stripped)
            except BadSample as fault:
                item.drop(self.name, str(fault))
                continue
            if turns == sample.messages:
                item.keep(self.name)
            else:
                item.change(self.name, stripped)

    def turn(self, message: Message) -> Message:
        if message.role != "user":
            return message
        parts = [without_hints(part) if isinstance(part, str) else part for part in message.parts]
        return replace(message, parts=tuple(part for part in parts if part != ""))


# ------------------------------------------------------------------------------------------- form

# Where an answer begins, as other data sets write it; the first that is found is taken.
ENDINGS = (
    re.compile(r"<(conclusion|answer)>(?P<answer>.*?)(?:</\1>|\Z)", re.I | re.S),
    re.compile(r"^[ \t]*####(?P<answer>[^\n]+)\Z", re.M),
    re.compile(
        r"(?:^|(?<=[.!?。！？\n]))[ \t]*(?:so|thus|therefore|hence|finally)?,? ?\**(?:the )?"
        r"(?:final |correct )?answer\**\s?(?:is|:)\**(?P<answer>[^\n]+)\Z",
        re.I,
    ),
    re.compile(r"(?:因此|所以|综上)?[，,]?(?:最终|正确)?答案(?:是|为|：|:)(?P<answer>[^\n]+)\Z"),
)
TAG = re.compile(
    r"</?(?:think|thinking|thought|reasoning|summary|caption|conclusion|answer|begin_of_thought|end_of_thought"
    r"|begin_of_solution|end_of_solution)>|<\|(?:begin|end)_of_(?:thought|solution)\|>",
    re.I,
)
INNER_BOX = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")


def chain_and_answer(text: str, think: str | None = None) -> tuple[str, str]:
    """What an assistant turn thinks and what it answers, without tags and boxes; "" for no chain.

    >>> chain_and_answer("Two and one make three.\\n#### 3")
    ('Two and one make three.', '3')
    """
    # A box says best what the answer is; the first, if it is there again
    text = text.strip()
    before, box, after = text.partition(BOX)
    answer = boxed(box + after.partition(BOX)[0])
    if answer is None:
        found = next((match for ending in ENDINGS if (match := ending.search(text))), None)
        answer = found["answer"].rstrip(" .。") if found else text
        before = text[: found.start()] if found else ""

    # The chain is what was thought, or what stands before the answer
    thought = (think or "").strip()
    return bare(thought or whole_sentences(before)), bare(answer)


def whole_sentences(text: str) -> str:
    """Text before an answer, without the half sentence that leads to it."""
    *whole, last = SENTENCE_END.split(text)
    return "".join(whole) + (last if last.rstrip().endswith(">") else "")


def bare(text: str) -> str:
    """Without tags, and with what boxes hold in the place of boxes."""
    text = TAG.sub(" ", text)
    text = INNER_BOX.sub(r"\1", text)
    lines = [" ".join(line.split()) for line in text.split("\n")]
    return "\n".join(line for line in lines if line)


class Formed:
    r"""One form: a chain (or none yet), and one box with the answer."""

    name = "one form"

    def __call__(self, items: list[Item]) -> None:
        for item in items:
            try:
                formed = in_one_form(item.sample)
            except BadSample as fault:
                item.drop(self.name, str(fault))
                continue
            if formed.messages == item.sample.messages:
                item.keep(self.name)
            else:
                item.change(self.name, formed)


def in_one_form(sample: Sample) -> Sample:
    """Raises BadSample without an answer, with several, and for one that is too long for a box."""
    at = last_answer(sample)
    if at is None:
        raise BadSample("no answer", f"{sample.origin}: no assistant turn")
    turn = sample.messages[at]
    boxes = set(INNER_BOX.findall(text_of_message(turn)))
    if len(boxes) > 1:
        raise BadSample("several boxes", f"{sample.origin}: {excerpt(', '.join(sorted(boxes)))}")

    # What is thought, and what is answered
    chain, answer = chain_and_answer(text_of_message(turn), turn.think)
    if not answer or answer.count("{") != answer.count("}"):
        raise BadSample("no answer", f"{sample.origin}: {excerpt(answer)}")
    if len(answer) > LONGEST_BOXED:
        raise BadSample("essay for an answer", f"{sample.origin}: {len(answer)} characters")
    return with_chain(sample, chain or None, answer)


def with_chain(sample: Sample, chain: str | None, answer: str) -> Sample:
    """The question, this chain, and a box around the answer."""
    turn = Message("assistant", (f"{BOX}{answer}}}",), think=chain)
    return replace(sample, messages=(*question_turns(sample), turn))


def answer_in_box(sample: Sample) -> str:
    return boxed(text_of_message(sample.messages[-1])) or ""


# ------------------------------------------------------------------------------------------ guide


class Guided(AskStep):
    """A chain by the annotator, from question and answer, where there is none (or `all_of_them`)."""

    name = "guided"

    def __init__(self, annotator, longest: int, all_of_them: bool = False):
        """longest: characters of a chain."""
        super().__init__(annotator)
        self.longest = longest
        self.all_of_them = all_of_them

    def request(self, item: Item) -> Request | None:
        sample = item.sample
        if chain_of_turn(sample) and not self.all_of_them:
            item.keep(self.name, "has a chain")
            return None
        truth = one_truth(sample)
        fields = {"question": last_question(sample), "answer": truth}
        return Request("guided_chain", fields, pictures_in(sample), sample)

    def read(self, item: Item, reply: str) -> None:
        chain = bare(words_in(reply, self.longest))
        if not chain or refuses(chain):
            raise BadSample("empty reply", excerpt(reply))
        guided = with_chain(item.sample, chain, one_truth(item.sample))
        item.change(self.name, guided, "written by the annotator")


def chain_of_turn(sample: Sample) -> str:
    return (sample.messages[-1].think or "").strip()


def one_truth(sample: Sample) -> str:
    truth = truth_of(sample)
    return truth if isinstance(truth, str) else truth[0]


# ---------------------------------------------------------------------------------------- overlap


def overlap_of(chain: str, known: str) -> float:
    """The share of a chain's words that question and answer (`known`) have as well; signs do not count."""
    said = [word for word in words(chain) if word[0].isalnum()]
    there = set(words(known))
    return sum(word in there for word in said) / max(1, len(said))


class NotRedundant:
    """Drops chains that say the question or the answer again."""

    name = "not redundant"

    def __init__(self, most: float):
        self.most = most

    def __call__(self, items: list[Item]) -> None:
        for item in items:
            sample = item.sample
            known = f"{last_question(sample)} {answer_in_box(sample)}"
            overlap = overlap_of(chain_of_turn(sample), known)
            if overlap > self.most:
                item.drop(self.name, f"redundant: overlap {overlap:.2f}")
            else:
                item.keep(self.name, f"overlap {overlap:.2f}")


# ---------------------------------------------------------------------------------------- distill


class Distilled(AskStep):
    """Keeps what comes to the right answer: by the grader's rules, else by the annotator's word.

    judge_all: ask about every chain. A rule sees where a chain ends, not whether what it says is there.
    """

    name = "answer distilled"

    def __init__(self, annotator, judge_all: bool = False):
        super().__init__(annotator)
        self.judge_all = judge_all

    def request(self, item: Item) -> Request | None:
        sample = item.sample
        said = answer_in_box(sample)
        settled = right_by_rule(sample, said) and concludes(chain_of_turn(sample), said)
        if settled and not self.judge_all:
            item.keep(self.name, "by rule")
            return None
        fields = {
            "question": last_question(sample),
            "answer": one_truth(sample),
            "chain": chain_of_turn(sample),
            "said": said,
        }
        return Request("same_answer", fields, pictures_in(sample), sample)

    def read(self, item: Item, reply: str) -> None:
        verdict = None if refuses(reply) else yes_or_no(reply)
        if verdict is None:
            raise BadSample("no verdict", excerpt(reply))
        if verdict == "no":
            raise BadSample(
                "another answer", f"{excerpt(answer_in_box(item.sample))} says the judge"
            )
        item.keep(self.name, "by the judge")


def right_by_rule(sample: Sample, said: str) -> bool:
    grader = known_grader(sample)
    return grader != JUDGED and grade(said, truth_of(sample), grader) >= 1


# ------------------------------------------------------------------------------------------ check


class Checked:
    """One chain and one box, long enough to be a chain, not longer than allowed, and no loop."""

    name = "checked"

    def __init__(self, longest: int):
        """longest: words of a chain."""
        self.longest = longest

    def __call__(self, items: list[Item]) -> None:
        for item in items:
            why = self.fault_of(item.sample)
            if why:
                item.drop(self.name, why)
            else:
                item.keep(self.name, f"{chain_words(item.sample)} words")

    def fault_of(self, sample: Sample) -> str:
        chain = chain_of(sample)
        whole = f"<think>{chain}</think>{text_of_message(sample.messages[-1])}"
        number = chain_words(sample)
        if not format_reward(whole, finished=True) or TAG.search(chain):
            return f"not the form: {excerpt(whole)}"
        if refuses(chain):
            return f"refused: {excerpt(chain)}"
        if number < FEWEST_WORDS:
            return f"short chain: {number} words"
        if number > self.longest:
            return f"long chain: {number} words, the limit is {self.longest}"
        if number >= LOOPS_FROM and distinct([chain], 4) < LEAST_DISTINCT:
            return f"loops: {excerpt(chain)}"
        return ""


def chain_words(sample: Sample) -> int:
    return len(words(chain_of_turn(sample)))


# ----------------------------------------------------------------------------------- the whole set


class Fingerprinted:
    """The digest of all pixels, as a fact: a picture is the same under another name and in another file."""

    name = "pictures"

    def __call__(self, items: list[Item]) -> None:
        for item in items:
            try:
                item.keep(self.name, pixels=digest_of_pictures(item.sample))
            except BadSample as fault:
                item.drop(self.name, str(fault))


class Distinct:
    """Over the whole set: the first of each (pictures, question)."""

    name = "no duplicate"

    def __call__(self, items: list[Item]) -> None:
        first: dict[tuple[str, str], str] = {}
        for item in items:
            key = (item.sample.facts["pixels"], plain(last_question(item.sample)))
            if key in first:
                item.drop(self.name, f"duplicate: of {first[key]}")
                continue
            first[key] = item.origin
            facts = {name: value for name, value in item.sample.facts.items() if name != "pixels"}
            item.sample = replace(item.sample, facts=facts)
            item.keep(self.name)


def length_class(sample: Sample) -> int:
    """Chains of 4 to 7 words, of 8 to 15, of 16 to 31, ..."""
    return chain_words(sample).bit_length()


# ---------------------------------------------------------------------------------------- command


@dataclass
class LongCotOptions(PipelineOptions):
    """Curate chains of thought: strip, one form, guide, overlap, distill, check, distinct, balance."""

    annotator: AnnotatorOptions = field(default_factory=AnnotatorOptions)
    rewrite: bool = False  # have every chain written anew, not only those that are missing
    overlap: float = 0.8  # most of a chain's words that question and answer may have
    judge_all: bool = False  # ask about chains that come to the right answer by rule, too
    longest: int = 8192  # words of a chain
    share: float = 0.8  # of what is left, to keep evenly over lengths; 1: all


def curate_chains(options: LongCotOptions) -> None:
    if not 0 < options.overlap <= 1:
        raise ValueError(f"--overlap {options.overlap:g}: 0 < overlap <= 1 is wanted")
    balanced = EvenOver("lengths balanced", length_class, options.share, options.seed)
    ranks = parallel.start()
    annotator = open_annotator(options.annotator, options.seed)
    steps = [
        Stripped(),
        Formed(),
        Fingerprinted(),
        Guided(annotator, 8 * options.longest, options.rewrite),
        NotRedundant(options.overlap),
        Distilled(annotator, options.judge_all),
        Checked(options.longest),
    ]
    walk_and_report(options, ranks, steps, [Distinct(), balanced], annotator=annotator)


if __name__ == "__main__":
    command(curate_chains)
