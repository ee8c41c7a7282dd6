"""Grading: what a model answers on held-out scenes or a held-out file, family by family.

What it teaches: an accuracy means nothing without its chance level, its error, and the question as
it was put. Chance here is what a player gets who never looks at the picture but knows the test:
always the commonest answer, to the family or to that very question. The image matters if swapping
pictures between samples drops the accuracy to that level.

    Sample --Encoder.prompt--> batches of bounded size --generate--> text_of --graders.grade--> Score
                                       |                                ^
                                       +---- --answers FILE, as they come: the next run goes on there

    python evaluate.py --model runs/toy/final --data held_out.jsonl --images dir/
    python evaluate.py --model runs/mine --data MMBench_DEV_EN.tsv --circular --answers mmbench.jsonl
    python evaluate.py --model runs/mine --data docvqa.jsonl --grader anls --device cuda --dtype bfloat16
    torchrun --nproc-per-node 8 evaluate.py --model runs/mine --data pope.tsv
    python evaluate.py --endpoint http://127.0.0.1:8000/v1 --model final --data held_out.tsv

With an endpoint, any server that speaks OpenAI's protocol is asked instead (harness/remote.py).
Rows are LLaVA's, VLMEvalKit's or one's own (data/readers.py). `facts` of a row may name its
`grader`, `family` and `category`. Without a grader, options make it multiple choice, a truth of yes
or no a yes-no question, and several annotators' answers VQA. What every grader means, and where it
is defined: graders.py.

Simplified: no judge model, so an answer in a long sentence is found by rules or not at all.

Sources: SAIL-VL2 section 6.1 evaluates with VLMEvalKit (arXiv 2407.11691). Our choices: exact rules in
place of a judge model, 95 % intervals after Wilson, the mean over families as the overall score.
"""

import hashlib
import json
import logging
import math
import os
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Callable, Iterator, Literal

import torch
from tqdm import tqdm

from data.encode import Encoder, known_grader, with_thinking
from data.readers import Folder
from data.sample import BadSample, Faults, Sample
from generate import Answer, generate, load_model
from graders import (
    GRADERS,
    JUDGED,
    accepted_truths,
    box_of,
    choice_in_sentence,
    choice_letter,
    final_answer,
    grade,
    grader_of,
    options_of,
    plain,
    symbolic_note,
)
from harness.remote import RemoteModel, written_out
from infra.cli import command
from infra.device import pick_device
from infra.endpoint import ChatEndpoint, NoReply
from infra.judge import JUDGE
from rewards import answer_reward
from scale import parallel
from scale.experts import catch_up
from tokenizer import Tokenizer
from vlm import SailVL

# Tokens of the prompts and answers that run together: what their keys and values cost.
PREFILL_TOKENS = 1 << 16
# Samples that are encoded, and sorted by length, together; and bytes of their pixels.
WINDOW = 2048
WINDOW_BYTES = 1 << 28
# Standard errors on each side of a 95 % interval.
Z = 1.96
# Commonest answers that a blind player tries.
CANDIDATES = 20
# Questions to an endpoint between two writings of answers, for each that it is asked at once.
PART = 8
# Options that are read with --endpoint alone, and those that are read without it alone.
REMOTE = ("key_name", "at_once", "timeout", "cache", "think_prompt")
LOCAL = ("tokens", "device", "dtype")


@dataclass(frozen=True)
class Score:
    """accuracy in [0, 1] over n samples; chance: the best blind strategy's."""

    accuracy: float
    chance: float
    n: int

    @property
    def error(self) -> float:
        """Standard error of the accuracy (binomial, at least one sample's worth)."""
        a = min(max(self.accuracy, 1 / (2 * self.n)), 1 - 1 / (2 * self.n))
        return math.sqrt(a * (1 - a) / self.n)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval after Wilson (JASA 22, 1927): inside [0, 1], and right for few samples."""
        a = self.accuracy
        z2_n = Z * Z / self.n

        # the share is pulled towards one half, and its error never reaches zero
        center = a + z2_n / 2
        half = math.sqrt(z2_n * (a * (1 - a) + z2_n / 4))
        low = (center - half) / (1 + z2_n)
        high = (center + half) / (1 + z2_n)
        return max(0.0, low), min(1.0, high)


@dataclass(frozen=True)
class Graded:
    """One graded sample, for tables and for the report. grader: the rule that gave the score."""

    family: str
    question: str
    truth: str
    said: str
    score: float
    sample: Sample
    grader: str = "auto"


# ------------------------------------------------------------------------------- what a sample asks


def question_texts(sample: Sample) -> list[str]:
    """What the last question says in words, part by part; of a picture alone, nothing."""
    for message in reversed(sample.messages):
        if message.role == "user":
            return [p for p in message.parts if isinstance(p, str) and p.strip()]
    return []


def question_of(sample: Sample) -> str:
    """The last question's last line that is no option: what samples are grouped and shown by."""
    texts = question_texts(sample)
    if not texts:
        return sample.facts.get("question", "")

    lines = [line.strip() for line in texts[-1].strip().split("\n") if line.strip()]
    if options_of(texts[-1]):
        asked = [line for line in lines if not re.match(r"\(?[A-Z][).:]\s|Answer with", line)]
        lines = asked or lines
    return lines[-1]


def family_of(sample: Sample) -> str:
    return sample.facts.get("family", sample.task)


def question_options(sample: Sample) -> dict[str, str]:
    """The options of the last question, as lines of its text: letter -> text."""
    return options_of("\n".join(question_texts(sample)))


def evaluation_grader(sample: Sample) -> str:
    """The grader of a sample: what its facts or its family say, else by the form of the question."""
    name = grader_of(sample.facts)
    if name != "auto" or sample.facts.get("grader"):
        return name

    # options make it multiple choice, a truth of yes or no a yes-no question, and truths that
    # repeat each other come from annotators
    truths = accepted_truths(sample.facts.get("answer"))
    if len(truths) == 1 and choice_letter(truths[0]) in question_options(sample):
        return "mcq"
    if truths and all(plain(truth) in ("yes", "no") for truth in truths):
        return "yesno"
    if len(truths) > 3 and len(set(truths)) < len(truths):
        return "vqa"
    return "auto"


def score_of(said: str, sample: Sample, finished: bool, think: bool, grader: str = "") -> float:
    """What one completion is worth. Cut off: nothing. With `think` only a well-formed box counts."""
    name = grader or evaluation_grader(sample)
    truth = sample.facts.get("answer")
    if think:
        return answer_reward(said, truth, finished, name)

    answer = final_answer(said)
    if name == "mcq":
        answer = named_option(answer, question_options(sample)) or answer
    return grade(answer, truth, name) if finished else 0.0


def named_option(answer: str, options: dict[str, str]) -> str:
    """The letter of the one option whose words an answer says; none if it names a letter itself."""
    words = plain(answer)
    texts = {letter: plain(text) for letter, text in options.items() if plain(text)}
    exact = [letter for letter, text in texts.items() if text == words and len(text) > 1]
    if len(exact) == 1:
        return exact[0]
    if choice_in_sentence(answer) in options:
        return ""

    # in a sentence: one option's words and no other's
    inside = [
        letter
        for letter, text in texts.items()
        if re.search(rf"(?<!\w){re.escape(text)}(?!\w)", words)
    ]
    return inside[0] if len(inside) == 1 else ""


def usable(sample: Sample, grader: str = "") -> Sample:
    """The sample. Raises BadSample when it cannot be graded: no question, no truth, no such grader
    (`grader` replaces its own)."""
    if not any(message.role == "user" for message in sample.messages):
        raise BadSample("no question", f"{sample.origin}: no user turn")
    if sample.messages[-1].role != "assistant":
        raise BadSample("no answer", f"{sample.origin}: it does not end with an answer")
    if not accepted_truths(sample.facts.get("answer")):
        raise BadSample("no truth", f"{sample.origin}: facts hold no `answer` to grade by")
    if not grader and known_grader(sample) == JUDGED:
        raise BadSample("wants a judge", f"{sample.origin}: only rl.py has one")
    return sample


def gradable(samples: list[Sample], faults: Faults, grader: str = "") -> list[Sample]:
    """Those that can be graded; the others are counted. `grader` replaces the samples' own."""
    good = []
    for sample in samples:
        try:
            good.append(usable(sample, grader))
        except BadSample as fault:
            faults.add(fault)
    return good


def askable(samples: list[Sample], encoder: Encoder, faults: Faults) -> list[Sample]:
    """Those that can be asked and graded, found before anything is: one with a bad picture costs itself."""
    good = []
    for sample in gradable(samples, faults):
        try:
            encoder.prompt(sample)
        except BadSample as fault:
            faults.add(fault)
        else:
            good.append(sample)
    return good


# ------------------------------------------------------------------------------------------- asking


@dataclass(frozen=True)
class Decoding:
    """How answers are made: `tries` of at most `max_new` tokens for each sample.

    At most `batch` prompts, and as many as fit into `tokens` with their answers, run together. swap:
    every sample gets the images of another one (same count and sizes).
    """

    think: bool = False
    max_new: int = 48
    temperature: float = 0.0
    seed: int = 0
    swap: bool = False
    batch: int = 512
    tokens: int = PREFILL_TOKENS
    tries: int = 1


def ask(
    model: SailVL,
    encoder: Encoder,
    samples: list[Sample],
    think: bool = False,
    max_new: int = 48,
    batch: int = 512,
    temperature: float = 0.0,
    seed: int = 0,
    swap: bool = False,
    tokens: int = PREFILL_TOKENS,
    faults: Faults | None = None,
) -> list[Answer | None]:
    """Answers to the last question of each sample, on every rank; each rank works out its share.

    `swap` gives each sample the images of another one (same count). At most `batch` prompts, and as
    many as fit into `tokens` with their answers, run together. A sample that cannot be encoded
    raises BadSample; with `faults` it is counted there and its answer is None.
    """
    rank, size = parallel.place()
    mine = samples[rank::size]
    answers: list[Answer | None] = [None] * len(mine)
    bad = None if faults is None else []
    decoding = Decoding(think, max_new, temperature, seed, swap, batch, tokens)
    for place, tried in answer_stream(model, encoder, mine, decoding, bad):
        answers[place] = tried[0]

    # every rank gets all answers, and counts all faults; the others wait for this one, also when it was
    # told to stop
    catch_up(model)
    if faults is not None:
        for fault in parallel.gather(bad):
            faults.add(fault)
    whole: list[Answer | None] = [None] * len(samples)
    for r, part in enumerate(parallel.gather([answers])):
        whole[r::size] = part
    return whole


@torch.no_grad()
def answer_stream(
    model: SailVL,
    encoder: Encoder,
    samples: list[Sample],
    decoding: Decoding,
    bad: list[BadSample] | None = None,
) -> Iterator[tuple[int, list[Answer]]]:
    """(place of the sample, its `tries` answers) as they come, on this rank alone.

    Samples that cannot be encoded go to `bad`; without such a list they raise BadSample.
    """
    tries = decoding.tries
    done = 0
    was_training = model.training
    model.eval()
    try:
        prompt_of = partial(asked_prompt, encoder, decoding.think)
        for places, prompts in encoded_windows(prompt_of, samples, bad):
            if decoding.swap:
                prompts = swapped(prompts)

            # prompts of like length, as many as the keys and values have room for
            lengths = [(len(ids) + decoding.max_new) * tries for ids, _ in prompts]
            for part in bounded_batches(lengths, decoding.batch, decoding.tokens):
                answers = generate(
                    model,
                    [prompts[i] for i in part],
                    encoder.tokenizer.ends,
                    decoding.max_new,
                    tries,
                    decoding.temperature,
                    seed=decoding.seed + done,
                )
                done += len(part)
                for row, i in enumerate(part):
                    yield places[i], answers[row * tries : (row + 1) * tries]
    finally:
        model.train(was_training)


def asked_prompt(encoder: Encoder, think: bool, sample: Sample) -> tuple[list[int], list]:
    """The prompt that the model gets, with the request to think or without. Raises BadSample."""
    return encoder.prompt(
        with_thinking(sample, encoder.tokenizer.think_prompt) if think else sample
    )


def encoded_windows(prompt_of: Callable[[Sample], tuple], samples: list[Sample], bad) -> Iterator:
    """(places, prompts) of some neighbouring samples at a time: their pixels fit into memory."""
    places: list[int] = []
    prompts: list = []
    pixels = 0
    for place, sample in enumerate(samples):
        try:
            prompt = prompt_of(sample)
        except Exception as error:
            # whatever a decoder raises costs this sample
            if bad is None:
                raise
            bad.append(_fault_of(error, sample))
            continue

        # a window is full by its number or by its pixels
        places.append(place)
        prompts.append(prompt)
        pixels += sum(image.nbytes for image in prompt[1])
        if len(prompts) == WINDOW or pixels > WINDOW_BYTES:
            yield places, prompts
            places = []
            prompts = []
            pixels = 0
    if prompts:
        yield places, prompts


def _fault_of(error: Exception, sample: Sample) -> BadSample:
    if isinstance(error, BadSample):
        return error
    return BadSample("not encoded", f"{sample.origin}: {type(error).__name__} {error}"[:300])


def bounded_batches(lengths: list[int], most: int, tokens: int) -> Iterator[list[int]]:
    """Places in parts of at most `most` and, padded to the longest, `tokens` (one always fits)."""
    by_length = sorted(range(len(lengths)), key=lambda i: lengths[i])
    part: list[int] = []
    for place in by_length:
        if part and (len(part) == most or (len(part) + 1) * lengths[place] > tokens):
            yield part
            part = []
        part.append(place)
    if part:
        yield part


def swapped(prompts: list) -> list:
    """Each prompt with the images of the next one that has as many of the same sizes."""
    # only pictures of the same sizes take as many tokens
    groups = defaultdict(list)
    for i, (_, images) in enumerate(prompts):
        groups[tuple(image.shape for image in images)].append(i)

    out = list(prompts)
    for group in groups.values():
        for i, neighbour in zip(group, group[1:] + group[:1]):
            ids, _ = prompts[i]
            out[i] = (ids, prompts[neighbour][1])
    return out


def text_stream(
    model: SailVL, encoder: Encoder, decoding: Decoding, samples: list[Sample], bad: list[BadSample]
) -> Iterator[tuple[int, list[tuple[str, bool]]]]:
    """(place of the sample, [(text, finished), ...]) as they come, of a model in this process."""
    for place, answers in answer_stream(model, encoder, samples, decoding, bad):
        yield place, [(text_of(answer, encoder.tokenizer), answer.finished) for answer in answers]


def reply_stream(
    remote: RemoteModel, decoding: Decoding, samples: list[Sample], bad: list[BadSample]
) -> Iterator[tuple[int, list[tuple[str, bool]]]]:
    """The same of a model behind an address. A question without a reply goes to `bad`."""
    seed = decoding.seed if decoding.temperature > 0 else None
    size = PART * remote.endpoint.at_once
    for places, prompts in encoded_windows(remote.prompt, samples, bad):
        if decoding.swap:
            prompts = swapped(prompts)

        # part by part, so that answers are on disk before all of them are there
        for first in range(0, len(prompts), size):
            part = prompts[first : first + size]
            replies = remote.replies(part, decoding.tries, seed)
            for place, said in zip(places[first : first + size], replies):
                if isinstance(said, NoReply):
                    bad.append(BadSample("no reply", f"{samples[place].origin}: {said}"))
                else:
                    yield place, said


def text_of(answer: Answer, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(answer.ids[:-1] if answer.finished else answer.ids)


def evaluate(
    model: SailVL,
    encoder: Encoder,
    samples: list[Sample],
    think: bool = False,
    swap: bool = False,
    max_new: int = 48,
    grader: str = "",
    faults: Faults | None = None,
) -> tuple[dict[str, Score], list[Graded]]:
    """Score per family (plus "overall", the mean over families) and every graded sample.

    With `think` the model is asked to think, and only a well-formed box counts. `grader` replaces
    those of the samples. A sample that cannot be used costs that sample: it is counted in `faults`,
    or else in a warning. Raises ValueError when none is left.
    """
    # what can be graded
    counted = Faults() if faults is None else faults
    kept = gradable(samples, counted, grader)

    # asked, and graded where there is an answer
    answers = ask(model, encoder, kept, think, max_new, swap=swap, faults=counted)
    graded = []
    for sample, answer in zip(kept, answers):
        if answer is not None:
            said = text_of(answer, encoder.tokenizer)
            graded.append(graded_sample(sample, said, answer.finished, think, grader))

    # nobody asked for the faults: say them
    if faults is None and counted.counts:
        logging.getLogger(__name__).warning("not graded:\n%s", counted.report())
    if not graded:
        raise ValueError(f"none of {len(samples)} samples can be graded\n{counted.report()}")
    return summary(graded), graded


def graded_sample(
    sample: Sample, said: str, finished: bool, think: bool, grader: str = ""
) -> Graded:
    return Graded(
        family_of(sample),
        question_of(sample),
        " | ".join(accepted_truths(sample.facts.get("answer"))),
        said,
        score_of(said, sample, finished, think, grader),
        sample,
        grader or evaluation_grader(sample),
    )


# ------------------------------------------------------------------------------------------ scoring


def group_of(graded: Graded) -> str:
    """The line of the table that a sample belongs to: its family, or "text" without a picture."""
    return "text" if graded.sample.task == "text" else graded.family


def summary(
    graded: list[Graded], group: Callable[[Graded], str] = group_of, chance: bool = True
) -> dict[str, Score]:
    """Score of each group, and "overall": the mean over groups. Raises ValueError for no samples."""
    if not graded:
        raise ValueError("nothing was graded, so there is no score")
    groups = defaultdict(list)
    for g in graded:
        groups[group(g)].append(g)

    # each group against what a blind player gets there
    scores = {}
    for name, members in groups.items():
        accuracy = sum(g.score for g in members) / len(members)
        grader = Counter(g.grader for g in members).most_common(1)[0][0]
        blind = blind_chance([g.sample for g in members], grader) if chance else 0.0
        scores[name] = Score(accuracy, blind, len(members))

    mean_accuracy = sum(s.accuracy for s in scores.values()) / len(scores)
    mean_chance = sum(s.chance for s in scores.values()) / len(scores)
    return scores | {"overall": Score(mean_accuracy, mean_chance, len(graded))}


def blind_chance(samples: list[Sample], grader: str = "") -> float:
    """Score of the best player who knows the test but never looks.

    Two players are tried, and the better one counts:

        one answer     the same to every question: the best of the commonest ones
        by question    for each question its commonest answer; where several are about as common
                       (within a standard error) any of them, so that a tie is no knowledge; where a
                       question has no answer twice, the answer of the first player

    An answer is worth something on a sample only if another sample has it, too: a player cannot know
    what is said once. So distinct answers give nothing, four equal ones a quarter, and always saying
    "right" what share of "right" there is.
    """
    if not samples:
        return 0.0
    truths = [accepted_truths(s.facts.get("answer")) for s in samples]
    spoken = [Counter(t).most_common(1)[0][0] if t else "" for t in truths]

    # of two truths it is enough to know whether they are the same text
    names = [grader or evaluation_grader(s) for s in samples]
    names = ["auto" if name == "symbolic" else name for name in names]

    # the same pairs come up again and again
    graded: dict[tuple, float] = {}

    def worth(answer: str, i: int, known: Counter) -> float:
        """Of an answer on sample i, if any other sample has it."""
        if known[answer] == (spoken[i] == answer):
            return 0.0
        pair = (answer, tuple(truths[i]), names[i])
        if pair not in graded:
            graded[pair] = grade(answer, truths[i], names[i])
        return graded[pair]

    # the first player: one answer to everything
    said_by = Counter(spoken)
    constant = ""
    first = 0.0
    for answer, _ in said_by.most_common(CANDIDATES):
        total = sum(worth(answer, i, said_by) for i in range(len(samples)))
        if total > first:
            constant = answer
            first = total

    # the second: to each question its own
    by_question = defaultdict(list)
    for i, sample in enumerate(samples):
        by_question[question_of(sample)].append(i)
    second = 0.0
    for places in by_question.values():
        known = Counter(spoken[i] for i in places)
        most = known.most_common(1)[0][1]
        if most == 1:
            second += sum(worth(constant, i, said_by) for i in places)
            continue
        alike = [a for a, n in known.most_common(CANDIDATES) if n >= most - math.sqrt(most)]
        for i in places:
            second += sum(worth(answer, i, known) for answer in alike) / len(alike)
    return max(first, second) / len(samples)


def yes_no_scores(said: list[str], truths: list[str]) -> dict[str, float]:
    """POPE's figures, "yes" being the positive: accuracy, precision, recall, F1, share of yes.

    As its script reads answers (arXiv 2305.10355; github.com/AoiDragon/POPE): of the first sentence,
    whatever holds no "No", "not" or "no" is a yes. A ratio of nothing to nothing is 0.
    """
    # what was said, and what is so
    predicted = []
    for text in said:
        words = text.split(".")[0].replace(",", "").split(" ")
        predicted.append(not {"No", "not", "no"} & set(words))
    actual = [truth.strip().lower() == "yes" for truth in truths]

    # the four cells of the table, and what follows from them
    pairs = Counter(zip(predicted, actual, strict=True))
    true_yes = pairs[True, True]
    precision = true_yes / max(1, sum(predicted))
    recall = true_yes / max(1, sum(actual))
    return {
        "accuracy": (true_yes + pairs[False, False]) / max(1, len(actual)),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if true_yes else 0.0,
        "yes": sum(predicted) / max(1, len(actual)),
    }


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Chance that one of k answers is right, from `correct` right ones of n: 1 - C(n-c, k) / C(n, k).

    The unbiased estimator of arXiv 2107.03374, Eq. 1. Raises ValueError unless 0 < k <= n.
    """
    if not 0 < k <= n or not 0 <= correct <= n:
        raise ValueError(f"pass@{k} of {n} answers with {correct} right does not exist")
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


# ------------------------------------------------------------------------------- circular evaluation


def rotations(sample: Sample) -> list[Sample]:
    """A multiple-choice question with its options moved round by 0, 1, ... places; else itself.

    Source: CircularEval of MMBench, arXiv 2307.06281, section 4.
    """
    options = question_options(sample)
    truths = accepted_truths(sample.facts.get("answer"))
    letter = choice_letter(truths[0]) if len(truths) == 1 else None
    if letter not in options:
        return [sample]

    # the message that asks
    roles = [message.role for message in sample.messages]
    place = len(roles) - 1 - roles[::-1].index("user")
    user = sample.messages[place]

    rotated = []
    letters = list(options)
    for shift in range(len(letters)):
        # each letter gets the words that stood `shift` places further on
        turned = letters[shift:] + letters[:shift]
        words = {letter: options[old] for letter, old in zip(letters, turned)}
        parts = tuple(with_options(p, words) if isinstance(p, str) else p for p in user.parts)
        messages = list(sample.messages)
        messages[place] = replace(user, parts=parts)

        # the truth went with its words
        answer = letters[turned.index(letter)]
        facts = sample.facts | {"answer": answer, "circle": sample.origin}
        origin = f"{sample.origin}/{shift}"
        rotated.append(replace(sample, messages=tuple(messages), facts=facts, origin=origin))
    return rotated


def with_options(text: str, options: dict[str, str]) -> str:
    """A question with other words behind its options' letters."""

    def line(match: re.Match) -> str:
        return match[1] + options.get(match[2], match[3])

    return re.sub(r"^([ \t]*\(?([A-Z])[).:][ \t]*)(\S.*?)[ \t]*$", line, text, flags=re.MULTILINE)


def whole_circles(graded: list[Graded]) -> list[Graded]:
    """One for each question: right only if it was right in every rotation.

    Rows of a benchmark that is rotated already say so by their index: 1000241 belongs to 241.
    """
    circles = defaultdict(list)
    for number, g in enumerate(graded):
        # rotated here, rotated in the file, or a question of its own
        facts = g.sample.facts
        index = str(facts.get("index", ""))
        if "circle" in facts:
            circle = facts["circle"]
        elif index.isdigit():
            circle = int(index) % 1_000_000
        else:
            circle = f"sample {number}"
        circles[circle].append(g)

    merged = []
    for members in circles.values():
        worst = min(g.score for g in members)
        merged.append(replace(members[0], score=worst))
    return merged


# --------------------------------------------------------------------------------------- the command


@dataclass
class EvaluateOptions:
    """Grade a model on a held-out file: LLaVA, VLMEvalKit's TSV, or rows of one's own."""

    data: Path
    # a model's directory; with --endpoint: the name that the server knows it by
    model: Path = Path("runs/toy/final")
    endpoint: str = ""  # ask a server instead, as in http://127.0.0.1:8000/v1 (OpenAI's protocol)
    images: Path | None = None  # where image paths start; none: beside the file
    # image paths may lead out of the images' folder, also through links
    allow_outside: bool = False
    think: bool = False  # ask for a chain of thought; then only the box counts
    grader: str = ""  # in place of those of the rows; a key of graders.GRADERS
    circular: bool = False  # multiple choice: right only if right in every order of its options
    swap: bool = False  # the control: every question with another one's pictures
    answers: Path | None = None  # write answers here as they come; the next run goes on from there
    limit: int = 0  # 0: all samples
    max_new: int = 48  # tokens of an answer
    tries: int = 1  # answers to each question, for pass@k (needs a temperature)
    temperature: float = 0.0  # 0: greedy
    seed: int = 0
    tokens: int = PREFILL_TOKENS  # of prompts and answers that run together: bounds the memory
    device: str = ""  # cpu, cuda, npu, mps; none: the rank's
    dtype: Literal["float32", "bfloat16"] = "float32"
    key_name: str = "OPENAI_API_KEY"  # with --endpoint: the environment variable that holds the key
    at_once: int = 16  # with --endpoint: requests on their way
    timeout: float = 120.0  # with --endpoint: seconds of a question with all its attempts
    # with --endpoint: keep replies here, so that none is asked for (and paid for) twice
    cache: Path | None = None
    # with --endpoint and --think: the words that ask for thinking; none: the server appends its own
    # (serve.py does, for the parameter `think`)
    think_prompt: str = ""


def evaluate_files(options: EvaluateOptions) -> None:
    """Ask, grade and print. Raises ValueError and OSError for what a user can mend."""
    refuse_options(options)
    ranks = parallel.start()
    folder = Folder(options.data, options.images, allow_outside=options.allow_outside)

    # what can be asked
    samples = gradable(folder.first(options.limit), folder.faults, options.grader)
    if options.circular:
        samples = [turned for sample in samples for turned in rotations(sample)]
    if not samples:
        raise ValueError(f"{options.data}: no sample can be graded\n{folder.faults.report()}")

    # who answers, and what the scores will depend on: shown before they take their time
    if options.endpoint:
        stream, form = remote_stream(options, folder.root, samples)
    else:
        stream, form = local_stream(options, ranks.device, folder.root, samples)
    note = symbolic_note({options.grader or evaluation_grader(sample) for sample in samples})
    if ranks.main:
        print(f"prompt: {_printable(form)}", note, sep="\n" if note else "", flush=True)

    # ask
    file = AnswerFile(options.answers, answer_settings(options, form), ranks.rank)
    said = ask_resumably(stream, samples, file, folder.faults)

    # grade: of several tries the mean counts, and how many of them are right
    graded = []
    passed = []
    for sample, answers in zip(samples, said):
        if not answers:
            continue
        tried = [
            graded_sample(sample, text, finished, options.think, options.grader)
            for text, finished in answers
        ]
        scores = [g.score for g in tried]
        graded.append(replace(tried[0], score=sum(scores) / len(scores)))
        passed.append(sum(score >= 1 for score in scores))
    if not graded:
        raise ValueError(f"{options.data}: no sample can be asked\n{folder.faults.report()}")

    if ranks.main:
        print(report_text(options, graded, passed, folder.faults), flush=True)
    parallel.stop()


def refuse_options(options: EvaluateOptions) -> None:
    """Raises ValueError for what cannot be, and for an option that nothing would read."""
    if options.grader and options.grader not in GRADERS:
        raise ValueError(f"--grader {options.grader!r}: choose from {', '.join(GRADERS)}")
    if options.tries > 1 and options.temperature <= 0:
        raise ValueError("--tries needs --temperature: greedy answers are all the same")

    # one that was given is one that differs from its default
    unread = LOCAL if options.endpoint else REMOTE
    why = "nothing is computed here with --endpoint" if options.endpoint else "it needs --endpoint"
    for field in fields(options):
        if field.name in unread and getattr(options, field.name) != field.default:
            raise ValueError(f"--{field.name.replace('_', '-')} would do nothing: {why}")
    if options.think_prompt and not options.think:
        raise ValueError("--think-prompt would do nothing: it needs --think")


def decoding_of(options: EvaluateOptions) -> Decoding:
    return Decoding(
        options.think,
        options.max_new,
        options.temperature,
        options.seed,
        options.swap,
        tokens=options.tokens,
        tries=options.tries,
    )


# (samples, faults) -> (place, [(text, finished), ...]) as they come
AnswerStream = Callable[[list[Sample], list[BadSample]], Iterator]


def local_stream(
    options: EvaluateOptions, rank_device: str, root: Path | None, samples: list[Sample]
) -> tuple[AnswerStream, str]:
    """What answers in this process, and the first prompt as the model reads it."""
    device = pick_device(options.device or rank_device)
    model, tokenizer = load_model(options.model, device, getattr(torch, options.dtype))
    encoder = Encoder(tokenizer, model.config, root)
    form = prompt_form(encoder, samples, options.think)
    return partial(text_stream, model, encoder, decoding_of(options)), form


def remote_stream(
    options: EvaluateOptions, root: Path | None, samples: list[Sample]
) -> tuple[AnswerStream, str]:
    """What answers behind the address, and the first prompt as it is sent. Raises ValueError when
    nobody answers there."""
    endpoint = ChatEndpoint(
        options.endpoint,
        options.model.as_posix(),
        timeout=options.timeout,
        cache=options.cache,
        key_name=options.key_name,
        at_once=options.at_once,
        role="endpoint",
        max_new=options.max_new,
        temperature=options.temperature,
    )
    endpoint.check()
    remote = RemoteModel(endpoint, root, options.think, options.think_prompt)

    # the first that can be asked
    bad: list[BadSample] = []
    first = next(encoded_windows(remote.prompt, samples[:PART], bad), ([], []))
    form = written_out(*first[1][0]) if first[1] else ""
    return partial(reply_stream, remote, decoding_of(options)), form


def prompt_form(encoder: Encoder, samples: list[Sample], think: bool) -> str:
    """The first prompt that can be made, as the model reads it; runs of visual tokens counted."""
    for sample in samples:
        try:
            ids, _ = asked_prompt(encoder, think, sample)
        except Exception:
            # counted when it is asked
            continue
        text = encoder.tokenizer.decode(ids)
        mark = encoder.tokenizer.decode([encoder.tokenizer.image])
        for count in sorted(map(len, re.findall(f"(?:{re.escape(mark)})+", text)), reverse=True):
            text = text.replace(mark * (count // len(mark)), f"{count // len(mark)} visual tokens")
        return text
    return ""


def ask_resumably(
    stream: AnswerStream, samples: list[Sample], file: "AnswerFile", faults: Faults
) -> list[list[tuple[str, bool]]]:
    """[(text, finished), ...] for each sample, empty where it could not be asked; on every rank."""
    # all ranks must agree on what is left to ask
    rank, size = parallel.place()
    known = parallel.gather([file.known if rank == 0 else {}])[0]
    names = [sample_name(sample) for sample in samples]
    todo = [i for i, name in enumerate(names) if name not in known]
    if known and rank == 0:
        print(f"{len(samples) - len(todo)} of {len(samples)} answers are in {file.path}")

    # this rank's share, each answer on disk as soon as it is there
    mine = todo[rank::size]
    bad: list[BadSample] = []
    new: dict[str, list[tuple[str, bool]]] = {}
    answers = stream([samples[i] for i in mine], bad)
    for place, texts in tqdm(
        answers, total=len(mine), desc="asked", disable=None if rank == 0 else True
    ):
        i = mine[place]
        new[names[i]] = texts
        file.write(names[i], samples[i], texts)

    # everybody's
    for fault in parallel.gather(bad):
        faults.add(fault)
    for part in parallel.gather([new]):
        known |= part
    return [[tuple(answer) for answer in known.get(name, [])] for name in names]


def sample_name(sample: Sample) -> str:
    """A sample's name in a file of answers: where it lies, and a digest of what it asks."""
    texts = [part for m in sample.messages for part in m.parts if isinstance(part, str)]
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]
    return f"{sample.origin}#{digest}"


def answer_settings(options: EvaluateOptions, form: str) -> dict:
    """What an answer depends on: another of these, and old answers must not be taken for new ones."""
    names = ("think", "swap", "max_new", "tries", "temperature", "seed", "dtype")
    settings = {name: getattr(options, name) for name in names}
    model = f"{options.model.as_posix()} at {options.endpoint}"
    if not options.endpoint:
        model = weights_digest(options.model)
    return {"model": model, "prompt": form} | settings


def weights_digest(directory: Path) -> str:
    """Of the names, sizes, heads and tails of the weight files: another checkpoint has another one."""
    digest = hashlib.sha256()
    for path in sorted(Path(directory).glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with open(path, "rb") as f:
            digest.update(f.read(1 << 16))
            f.seek(max(0, size - (1 << 20)))
            digest.update(f.read())
    return digest.hexdigest()[:16]


class AnswerFile:
    """JSON lines: first the settings, then one answered sample each. Without a path nothing is kept.

    Rank 0 writes FILE, rank 1 FILE.rank1 and so on; all of them are read. A line that was cut off by
    a kill is dropped. Raises ValueError when FILE was made with other settings.
    """

    def __init__(self, path: Path | None, settings: dict, rank: int):
        self.known: dict[str, list[tuple[str, bool]]] = {}
        self.path = None
        if path is None:
            return
        self.path = path if rank == 0 else path.with_name(f"{path.name}.rank{rank}")
        for part in [path, *sorted(path.parent.glob(f"{path.name}.rank*"))]:
            if part.is_file():
                self._read(part, settings)

        # begin the file, or go on behind its last whole line
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.is_file():
            whole = self.path.read_bytes().rfind(b"\n") + 1
            os.truncate(self.path, whole)
        if not self.path.is_file() or not whole:
            self._append({"settings": settings})

    def _read(self, path: Path, settings: dict) -> None:
        for number, line in enumerate(path.read_text("utf-8").splitlines()):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue

            # the head must be that of this run, the rest are answers
            if "settings" in row:
                changed = [k for k in settings if row["settings"].get(k) != settings[k]]
                if changed:
                    raise ValueError(
                        f"--answers {path}: its answers were made with another {', '.join(changed)}; "
                        "name another file, or remove this one"
                    )
            elif number == 0:
                raise ValueError(f"--answers {path}: not a file of answers; name another one")
            else:
                self.known[row["name"]] = row["said"]

    def write(self, name: str, sample: Sample, said: list[tuple[str, bool]]) -> None:
        if self.path is None:
            return
        row = {
            "name": name,
            "question": question_of(sample),
            "truth": accepted_truths(sample.facts.get("answer")),
            "said": said,
        }
        self._append(row)

    def _append(self, row: dict) -> None:
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(json.dumps(row, ensure_ascii=False) + "\n")


# --------------------------------------------------------------------------------------- the report


def report_text(
    options: EvaluateOptions, graded: list[Graded], passed: list[int], faults: Faults
) -> str:
    """The scores as lines: by family, by category, and what belongs to some kinds of questions."""
    lines = []
    questions = graded
    if options.circular:
        questions = whole_circles(graded)
        lines.append(f"circular: {len(graded)} orders of the options of {len(questions)} questions")

    # nobody who does not look is right in every order
    blind = not options.circular
    lines += score_lines("family", summary(questions, chance=blind), questions, group_of)
    if any(category_of(g) for g in questions):
        by_category = summary(questions, category_of, blind)
        lines += score_lines("category", by_category, questions, category_of)

    # figures of one kind of question
    yes_no = [g for g in graded if g.grader == "yesno"]
    if yes_no:
        said = [final_answer(g.said) for g in yes_no]
        figures = yes_no_scores(said, [plain(g.truth.split(" | ")[0]) for g in yes_no])
        lines.append("POPE   " + "  ".join(f"{name} {v:.1%}" for name, v in figures.items()))
    if any(g.grader in ("box", "iou") for g in graded):
        lines.append(f"boxes: coordinates as the truth's, {coordinate_scale(graded)}")

    # several answers to each question
    if options.tries > 1:
        for k in [k for k in (1, 2, 4, 8, 16, 32) if k <= options.tries]:
            mean = sum(pass_at_k(options.tries, c, k) for c in passed) / len(passed)
            lines.append(f"pass@{k} {mean:.1%}  (of {options.tries} answers to each question)")

    # what was lost on the way
    if JUDGE.lost:
        lines.append(f"{JUDGE.lost} expressions took too long to compare and count as wrong")
    if faults.counts:
        lines.append(_printable(faults.report()))
    return "\n".join(lines)


def category_of(graded: Graded) -> str:
    return str(graded.sample.facts.get("category") or "")


def score_lines(title: str, scores: dict[str, Score], graded: list[Graded], group) -> list[str]:
    """A table with a 95 % interval, the blind player's score and the graders of each line."""
    rules: dict[str, dict] = defaultdict(dict)
    for g in graded:
        rules[group(g)][g.grader] = True

    width = max(14, *(len(_printable(name)) for name in scores))
    lines = [f"{title:{width}s}   score   95 % interval    chance       n  graded by"]
    for name, s in scores.items():
        low, high = s.interval
        graded_by = ", ".join(rules[name]) if name in rules else f"mean over {len(scores) - 1}"
        lines.append(
            f"{_printable(name) or '(none named)':{width}s}  {s.accuracy:6.1%}  {low:6.1%} - {high:6.1%}  "
            f"{s.chance:6.1%}  {s.n:6d}  {graded_by}"
        )
    return lines


def coordinate_scale(graded: list[Graded]) -> str:
    """In words, from the largest coordinate among the truths."""
    boxes = [box_of(g.truth) for g in graded if g.grader in ("box", "iou")]
    largest = max((abs(v) for box in boxes if box for v in box), default=0.0)
    if largest <= 1:
        return "0 to 1"
    return "0 to 1000" if largest <= 1000 else f"pixels, up to {largest:g}"


def _printable(text: str) -> str:
    """Without control characters: what comes from data or a model must not steer a terminal."""
    return "".join(c if c.isprintable() else "\\n" if c == "\n" else " " for c in text)


if __name__ == "__main__":
    command(evaluate_files)
