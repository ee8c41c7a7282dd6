"""The oracle: an annotator that knows the drawn world, and errs as often as it is told to.

What it teaches: a pipeline can be judged only where the truth is known. The oracle answers what a strong
model would be asked (a caption, the scores of a caption, questions) from the scene's own words, which
samples of data/world.py carry in their facts and no model is shown.

Simplified: it reads the fields of a request, not its prompt.
"""

import random
from typing import Sequence

from curation.annotators import Request, Response
from curation.noise import alignment, richness


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
