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
from curation.noise import alignment, richness, wrong_attribute
from curation.told import told, true_answer
from graders import phrase_f1


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
        pairs = told(request.fields["caption"])
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

    def report(self) -> str:
        return f"{self.name}: {self.asked:,} asked"
