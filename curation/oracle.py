"""The oracle: an annotator that knows the drawn world, and errs as often as it is told to.

What it teaches: a pipeline can be judged only where the truth is known. The oracle answers what a strong
model would be asked (a caption, the scores of a caption, questions) from the scene's own words, which
samples of data/world.py carry in their facts and no model is shown.

Simplified: it reads the fields of a request, not its prompt.
"""

import json
import random
from typing import Sequence

from curation.annotators import Request, Response
from graders import final_answer, grade, grader_of
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
        return words

    # ------------------------------------------------------- latent classes, ratings, videos, chains

    def lot(self, request: Request) -> random.Random:
        """Random numbers for one answer: the same for the same seed, sample and task."""
        return random.Random(f"{self.seed}/{request.about.origin}/{request.task}")

    def say_class_phrase(self, request: Request, words: str) -> str:
        """One of several wordings for the family, half of them with a detail; wrong: another family's."""
        lot = self.lot(request)
        family = request.about.facts["family"]
        if lot.random() < self.noise:
            family = lot.choice(sorted(CLASS_PHRASES))
        phrase = lot.choice(CLASS_PHRASES[family])
        detail = lot.choice(words.split(", "))
        return f"{phrase}: {detail}" if lot.random() < 0.5 else phrase

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
        lot = self.lot(request)
        for name, (low, high) in scales.items():
            if lot.random() < self.noise:
                scores[name] = lot.randint(low, high)
        return json.dumps(scores)

    def say_answer_again(self, request: Request, words: str) -> str:
        """The truth; wrong: a piece of the scene."""
        lot = self.lot(request)
        return (
            lot.choice(words.split())
            if lot.random() < self.noise
            else request.about.facts["answer"]
        )

    def say_guided_chain(self, request: Request, words: str) -> str:
        """The scene's own chain; wrong: the question said again."""
        lot = self.lot(request)
        again = f"{request.fields['question']} {request.fields['answer']}."
        return again if lot.random() < self.noise else request.about.facts["chain"]

    def say_same_answer(self, request: Request, words: str) -> str:
        """Yes where the answer is the truth and the chain says nothing untrue; wrong: the opposite."""
        facts = request.about.facts
        right = grade(request.fields["said"], facts["answer"], grader_of(facts)) == 1
        sound = statements(request.fields["chain"]) <= statements(facts["chain"]) | statements(
            words
        )
        wrong = self.lot(request).random() < self.noise
        return "yes" if (right and sound) != wrong else "no"

    def report(self) -> str:
        return f"{self.name}: {self.asked:,} asked"
