"""What results.json proves: how sure a difference is, and which stage brought which skill.

What it teaches: two scores differ when they lie further apart than their error allows. The same
samples graded twice are a pair each, and pairs say more than two shares do.

    unpaired   .90 and .92 of 200 samples each      +2.0 ± 2.9 points: nothing is known
    paired     the same, of which 5 changed sides   +2.0 ± 0.9 points: better

Here a difference counts as sure above two standard errors. Our choices: binomial errors for shares
(an upper bound for scores between 0 and 1), no error for losses, "halfway" for when a skill came.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

BRANCHES = ("moe-branch",)  # side roads: the dense ladder does not go on from them
SURE = 2.0  # standard errors


@dataclass(frozen=True)
class Difference:
    """A change of a score (positive: up) and its standard error; None where it is not known."""

    value: float
    error: float | None = None

    @property
    def sure(self) -> bool:
        return self.error is not None and abs(self.value) > SURE * self.error

    def points(self) -> str:
        """In points of a hundred: `+2.0 ± 0.9`."""
        value = f"{100 * self.value:+.1f}"
        return value if self.error is None else f"{value} ± {100 * self.error:.1f}"


def share_error(share: float, n: int) -> float:
    """Standard error of a share of n samples (binomial, at least one sample's worth)."""
    a = min(max(share, 1 / (2 * n)), 1 - 1 / (2 * n))
    return math.sqrt(a * (1 - a) / n)


def paired(before: list[float], after: list[float]) -> Difference:
    """Mean of after - before over the same samples. Raises ValueError unless they are as many."""
    changes = [b - a for a, b in zip(before, after, strict=True)]
    n = len(changes)
    mean = sum(changes) / n

    # what the changes scatter around their mean
    variance = sum((change - mean) ** 2 for change in changes) / max(n - 1, 1)
    return Difference(mean, math.sqrt(variance / n))


def unpaired(before: float, after: float, n: int, m: int) -> Difference:
    """after (a share of m samples) - before (a share of n others)."""
    error = math.hypot(share_error(before, n), share_error(after, m))
    return Difference(after - before, error)


def improvement(stage: dict) -> Difference:
    """How much better a stage's metric is after it. Its own (paired) error where it has one."""
    if stage["lower_is_better"]:
        return Difference(stage["before"] - stage["after"], stage.get("error"))
    n = stage["samples"]
    rough = unpaired(stage["before"], stage["after"], n, n)
    if stage.get("error") is None:
        return rough
    return Difference(rough.value, stage["error"])


# ------------------------------------------------------------------------------- what is on disk


def read_results(directory: Path) -> dict:
    """results.json of a finished ladder. Raises ValueError where there is none."""
    path = Path(directory) / "results.json"
    if not path.is_file():
        raise ValueError(f"{path}: not there; a ladder writes it at its end (`make toy`)")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); run the ladder again") from None


def read_samples(directory: Path) -> dict:
    """samples.json: digests of the questions by family, and scores by stage and family; empty in older runs.

    Raises ValueError when it is no JSON.
    """
    path = Path(directory) / "samples.json"
    if not path.is_file():
        return {"questions": {}, "scores": {}}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path}: not JSON ({error}); remove it, or run the ladder again"
        ) from None


# ------------------------------------------------------------------------- what a ladder's scores say


def main_road(results: dict) -> dict[str, dict[str, float]]:
    """stage -> family -> accuracy after it, without the side roads."""
    after = results.get("families_after", {})
    branches = () if results.get("model") == "moe" else BRANCHES
    return {stage: scores for stage, scores in after.items() if stage not in branches}


def graded_families(results: dict) -> list[str]:
    """The families of the last grading; the mean over them comes last."""
    return sorted(results["final"], key=lambda family: family == "overall")


def lookups(results: dict) -> dict[str, str | None]:
    """family -> the first stage that left it above halfway between its chance and 1; None: no stage."""
    came: dict[str, str | None] = {}
    for family in graded_families(results):
        halfway = (results["final"][family]["chance"] + 1) / 2
        passed = [
            stage for stage, scores in main_road(results).items() if scores.get(family, 0) > halfway
        ]
        came[family] = passed[0] if passed else None
    return came


def stage_seconds(results: dict, name: str) -> float | None:
    """Seconds of the stages up to the end of this one (an ingredient of the soup: up to the soup's)."""
    names = [stage["name"] for stage in results["stages"]]
    place = "soup" if name.startswith("soup-") else name
    if place not in names:
        return None
    return sum(stage["seconds"] for stage in results["stages"][: names.index(place) + 1])


def in_words(names: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    if len(names) < 2:
        return "".join(names)
    return ", ".join(names[:-1]) + " and " + names[-1]
