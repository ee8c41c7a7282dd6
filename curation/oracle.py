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
from curation.chart_specs import invent_spec


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

    def say_chart_spec(self, request: Request, words: str) -> str:
        """A spec of the wished kind; a wrong one has no numbers."""
        rng = random.Random(f"{self.seed}/{request.about.origin}")
        spec = invent_spec(rng, request.fields["kind"], request.fields["language"]).record()
        wrong = rng.random() < self.noise
        return json.dumps(spec | {"series": {}} if wrong else spec)

    def report(self) -> str:
        return f"{self.name}: {self.asked:,} asked"
