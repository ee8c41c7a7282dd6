"""The oracle: an annotator that knows the drawn world, and errs as often as it is told to.

What it teaches: a pipeline can be judged only where the truth is known. The oracle answers what a strong
model would be asked (a caption, the scores of a caption, questions) from the scene's own words, which
samples of data/world.py carry in their facts and no model is shown.

Simplified: it reads the fields of a request, not its prompt.
"""

import json
import random
from typing import Sequence

from curation.chart_specs import invent_spec
from curation.noise import alignment, richness, wrong_attribute
from curation.requests import Request, Response
from curation.told import told_pairs, true_answer
from graders import final_answer, grade, grader_of, phrase_f1
from rewards import statements

# How somebody would name the task of a family.
CLASS_PHRASES = {
    "caption": ("describing the picture", "a caption", "saying all that shows"),
    "listing": ("listing each thing in a row", "looking up many things", "what each of them is"),
    "attributes": (
        "naming a color or shape",
        "what shape or color it is",
        "attribute of one thing",
    ),
    "spatial": ("where a thing is", "above, below, left or right", "position of a thing"),
    "counting": ("counting things", "how many there are", "number of dots or things"),
    "grounding": ("box of a thing", "finding the box around a thing", "corners of a thing"),
    "reading": ("reading text", "what the text says", "characters in a picture"),
    "charts": ("how high a bar is", "the highest or lowest bar", "value of a bar in a chart"),
    "arithmetic": ("result of a sum", "how much higher, a difference", "adding or taking away"),
    "odd": ("where the odd one is", "which differs from most", "finding the exception"),
    "video": ("which way a thing moves", "direction of a move in frames", "movement in a video"),
}


class Oracle:
    """noise: the share of its answers that are wrong; the same ones for the same seed and sample."""

    def __init__(self, noise: float = 0.0, seed: int = 0):
        if not 0 <= noise <= 1:
            raise ValueError("--annotator.noise is a share, between 0 and 1")
        self.noise = noise
        self.seed = seed
        self.name = f"oracle with noise {noise:g}"
        self.asked = 0

    def annotate(self, requests: Sequence[Request]) -> list[Response]:
        self.asked += len(requests)
        return [self.answer(request) for request in requests]

    def answer(self, request: Request) -> Response:
        """Raises nothing: a sample without the scene's words has no answer."""
        words = request.about.facts.get("words") if request.about else None
        if not words:
            return Response(None, "no scene: the oracle knows samples of the drawn world alone")
        say = getattr(self, f"say_{request.task}", None)
        if say is None:
            return Response(None, f"the oracle is not asked {request.task!r}")
        return Response(say(request, words))

    def say_caption(self, request: Request, words: str) -> str:
        """The scene's words; of a share, `noise`, one is another."""
        rng = self.dice(request)
        return wrong_attribute(words, rng) if rng.random() < self.noise else words

    def say_caption_with_alt(self, request: Request, words: str) -> str:
        return self.say_caption(request, words)

    def say_caption2qa(self, request: Request, words: str) -> str:
        """Pairs from the caption, drawn; a share of them, `noise`, with the answer of another one."""
        rng = self.dice(request)
        pairs = told_pairs(request.fields["caption"])
        rng.shuffle(pairs)
        answers = [answer for _, answer in pairs]
        said = []
        for question, answer in pairs[: int(request.fields["count"])]:
            if rng.random() < self.noise:
                answer = rng.choice(answers)
            said.append({"question": question, "answer": answer})
        return json.dumps(said)

    def say_answer_from_caption(self, request: Request, words: str) -> str:
        return true_answer(request.fields["caption"], request.fields["question"]) or "unanswerable"

    def say_answer_from_picture(self, request: Request, words: str) -> str:
        return true_answer(words, request.fields["question"]) or "unanswerable"

    def say_compare(self, request: Request, words: str) -> str:
        """Which of two captions has more of the scene's phrases right; a share, `noise`, by chance."""
        first = phrase_f1(request.fields["first"], words)
        second = phrase_f1(request.fields["second"], words)
        better = "same" if first == second else "1" if first > second else "2"
        rng = random.Random(f"{self.seed}/{request.about.origin}/{sorted(request.fields.items())}")
        if rng.random() < self.noise:
            better = rng.choice(("1", "2"))
        return json.dumps({"better": better})

    def say_vir(self, request: Request, words: str) -> str:
        return self.score(request, richness(request.fields["caption"], words))

    def say_ita(self, request: Request, words: str) -> str:
        return self.score(request, alignment(request.fields["caption"], words))

    def say_vir_yesno(self, request: Request, words: str) -> str:
        return self.verdict(request, richness(request.fields["caption"], words))

    def say_ita_yesno(self, request: Request, words: str) -> str:
        return self.verdict(request, alignment(request.fields["caption"], words))

    def score(self, request: Request, truth: int) -> str:
        """As the prompt asks for it; a wrong one is any other."""
        rng = self.dice(request)
        if rng.random() < self.noise:
            truth = rng.choice([score for score in range(1, 6) if score != truth])
        return f'{{"score": {truth}}}'

    def verdict(self, request: Request, truth: int) -> str:
        """Yes from 3 on (SAIL-VL2, section 3.1)."""
        wrong = self.dice(request).random() < self.noise
        return "yes" if (truth >= 3) != wrong else "no"

    def dice(self, request: Request) -> random.Random:
        """Random numbers of one request: the same whenever it is asked."""
        return random.Random(f"{self.seed}/{request.about.origin}/{request.task}")

    # ------------------------------------------------------- latent classes, ratings, videos, chains

    def say_class_phrase(self, request: Request, words: str) -> str:
        """One of several wordings for the family, half of them with a detail; wrong: another family's."""
        rng = self.dice(request)
        family = request.about.facts["family"]
        if rng.random() < self.noise:
            family = rng.choice(sorted(CLASS_PHRASES))
        phrase = rng.choice(CLASS_PHRASES[family])
        detail = rng.choice(words.split(", "))
        return f"{phrase}: {detail}" if rng.random() < 0.5 else phrase

    def say_ratings(self, request: Request, words: str) -> str:
        """More things are more complex, reasoning is a challenge, and what is untrue is not relevant."""
        # All that was said is in the scene, or comes from it
        facts = request.about.facts
        said = request.fields["conversation"].rpartition("assistant: ")[2]
        true = grade(final_answer(said), facts["answer"], grader_of(facts)) == 1
        chain = facts.get("chain") or ""
        scores = {
            "complexity": min(5, 1 + words.count(",") + ("assistant: <think>" in said)),
            "challenge": 1 if not chain else min(5, 2 + len(statements(chain)) // 2),
            "relevance": 1 if not true else 5 if request.pictures else 2,
        }
        return self.noisy(request, scores, {name: (1, 5) for name in scores})

    def say_video_scores(self, request: Request, words: str) -> str:
        """Wrong answers fit badly, a thing at rest is poor, and what one frame shows is easy."""
        facts = request.about.facts
        frames = words.split(", ")
        true = grade(request.fields["answer"], facts["answer"], grader_of(facts)) == 1
        still = len(set(frames)) == 1
        in_every_frame = all(facts["answer"] in frame for frame in frames)
        scores = {
            "alignment": 9 if true else 1,
            "richness": 2 if still else 5 + (len(set(frames)) > 2),
            "difficulty": 1 if in_every_frame else 5,
        }
        return self.noisy(
            request, scores, {"alignment": (-1, 10), "richness": (-1, 7), "difficulty": (-1, 8)}
        )

    def noisy(self, request: Request, scores: dict, scales: dict) -> str:
        """Scores as JSON; each is drawn from its scale instead as often as the noise says."""
        rng = self.dice(request)
        for name, (low, high) in scales.items():
            if rng.random() < self.noise:
                scores[name] = rng.randint(low, high)
        return json.dumps(scores)

    def say_answer_again(self, request: Request, words: str) -> str:
        """The truth; wrong: a piece of the scene."""
        rng = self.dice(request)
        return (
            rng.choice(words.split())
            if rng.random() < self.noise
            else request.about.facts["answer"]
        )

    def say_guided_chain(self, request: Request, words: str) -> str:
        """The scene's own chain; wrong: the question said again."""
        rng = self.dice(request)
        again = f"{request.fields['question']} {request.fields['answer']}."
        return again if rng.random() < self.noise else request.about.facts["chain"]

    def say_same_answer(self, request: Request, words: str) -> str:
        """Yes where the answer is the truth and the chain says nothing untrue; wrong: the opposite."""
        facts = request.about.facts
        right = grade(request.fields["said"], facts["answer"], grader_of(facts)) == 1
        sound = statements(request.fields["chain"]) <= statements(facts["chain"]) | statements(
            words
        )
        wrong = self.dice(request).random() < self.noise
        return "yes" if (right and sound) != wrong else "no"

    def say_chart_spec(self, request: Request, words: str) -> str:
        """A spec of the wished kind; a wrong one has no numbers."""
        rng = random.Random(f"{self.seed}/{request.about.origin}")
        spec = invent_spec(rng, request.fields["kind"], request.fields["language"]).record()
        wrong = rng.random() < self.noise
        return json.dumps(spec | {"series": {}} if wrong else spec)

    def report(self) -> str:
        return f"{self.name}: {self.asked:,} asked"
