"""Configurations as JSON: read strictly, checked against the dataclass that they fill."""

import json
import math
from dataclasses import fields
from pathlib import Path

LIMITS = {
    "num_hidden_layers": 1024,
    "num_experts": 4096,
}  # of a config that we believe; any other count: 2**20


def parse_json(text: bytes, source) -> dict:
    """A JSON object in which no key occurs twice (a second one would silently win). Raises ValueError naming the source."""

    def once(pairs: list) -> dict:
        if len(keys := dict(pairs)) < len(pairs):
            raise ValueError("a key occurs twice")
        return keys

    try:
        value = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{source}: not readable as JSON ({e})") from e
    if not isinstance(value, dict):
        raise ValueError(f"{source}: not a JSON object")
    return value


def read_config(directory, name: str = "config.json") -> dict:
    path = Path(directory) / name
    if not path.is_file():
        raise ValueError(
            f"{directory}: no {name} here; give the directory of a saved or released model"
        )
    return parse_json(path.read_bytes(), path)


def checked(value, kind: type, source: str):
    """A value of a config: of its type, numbers positive and not absurd. Raises ValueError naming the key."""
    key, number = (
        source.rpartition(" ")[2],
        isinstance(value, (int, float)) and not isinstance(value, bool),
    )
    if (
        kind is int
        and number
        and isinstance(value, int)
        and (key != "num_experts") <= value <= LIMITS.get(key, 1 << 20)
    ):
        return value
    if kind is float and number and 0 < value < math.inf:
        return float(value)
    if kind not in (int, float) and isinstance(value, kind):
        return value
    raise ValueError(f"{source} is {value!r:.80}, not a sensible {kind.__name__}")


def pick(kind, values, source: str, optional: tuple[str, ...] = (), **only):
    """A config dataclass from a larger dictionary (unknown keys belong to other tools). `only`: the single value of a key
    that we support, or a tuple of them. Raises ValueError naming a key that is missing, of a wrong type, or asks for what is not built."""
    if not isinstance(values, dict):
        raise ValueError(f"{source}: missing, or not an object")
    values = {key: value for key, value in values.items() if value is not None}
    for key, value in only.items():
        if key in values and values[key] not in (value if isinstance(value, tuple) else (value,)):
            raise ValueError(
                f"{source}: {key} {values[key]!r:.80} is not supported, only {value!r}"
            )
    lacking = [f.name for f in fields(kind) if f.name not in values and f.name not in optional]
    if lacking:
        raise ValueError(f"{source}: key {lacking[0]} is missing")
    return kind(
        **{
            f.name: checked(values[f.name], f.type, f"{source}: {f.name}")
            for f in fields(kind)
            if f.name in values
        }
    )
