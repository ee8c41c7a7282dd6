"""Results of ladders that never ran: what the tests of their pages read."""

CHANCE = {"counting": 0.2, "charts": 0.2, "overall": 0.2}


def stage(name: str, before: float, after: float, **more) -> dict:
    row = {
        "name": name,
        "metric": "overall accuracy",
        "seconds": 10.0,
        "before": before,
        "after": after,
        "chance": 0.2,
        "samples": 100,
        "lower_is_better": False,
    }
    return row | more


def ladder(seed: int = 0, charts: float = 0.9, think: float = 0.7) -> dict:
    """results.json of a ladder of four stages: counting comes first, charts in its own phase; sft2 costs
    counting 40 points, which the soup brings back."""
    after = {
        "multitask": (0.95, 0.3),
        "sft2": (0.55, charts),
        "soup-a": (0.9, charts),
        "soup": (0.95, charts),
        "moe-branch": (0.99, 0.99),
    }
    scores = {}
    for name, (counting, high) in after.items():
        scores[name] = {"counting": counting, "charts": high, "overall": (counting + high) / 2}
    final = {}
    for family, accuracy in scores["soup"].items():
        final[family] = {"accuracy": accuracy, "chance": CHANCE[family], "error": 0.03, "n": 100}
    return {
        "title": "ladder",
        "model": "dense",
        "seed": seed,
        "total_seconds": 40.0 + seed,
        "cores": 2,
        "versions": {"torch": "2.13"},
        "stages": [
            stage("language", 3.0, 1.0, metric="loss", lower_is_better=True),
            stage("multitask", 0.2, 0.625),
            stage("sft2", 0.3, charts, metric="accuracy on charts", families=["charts"]),
            stage("soup", 0.9, 0.92),
        ],
        "final": final,
        "families_after": scores,
        "modes": {
            "direct_thinks": 0.0,
            "direct_accuracy": 0.9,
            "think_thinks": 1.0,
            "think_accuracy": think,
        },
    }
