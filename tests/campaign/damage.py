"""Damage: every file of a checkpoint altered in every way that disks, copies and people alter files.

What it teaches: a checkpoint loads exactly, or is refused by name and the one before it is used. A
finished run with two checkpoints is copied, its newest is damaged, and the same command runs again.
Because the older one is ten steps back, an unnoticed damage would change what is trained from there; so
the end must be the undisturbed run's, bit for bit, and the refusal must have been said.

What was *forged* (another content, and sums that belong to it) cannot be told from a checkpoint by its
sums: it must end in one line that names the file, or in the run as it would have been, never in a
traceback.
"""

import hashlib
import json
import os
import random
import resource
import shutil
from pathlib import Path
from typing import Callable

import torch
from safetensors.torch import load_file, save_file

from tests.campaign import life, small
from tests.campaign.ledger import FOLDER, Ledger, Row, row_of

FILES = ("manifest.json", "config.json", "model.safetensors", "state.safetensors", "state.json")
FILES += ("tokenizer.tiktoken", "template.json")
JOB = small.SFT
MEMORY = 6 << 30  # bytes of address space
WORDS = (*JOB.words, "--save-every", "20")

Damage = Callable[[Path], None]


# ------------------------------------------------------------------------------------ what is done


def flipped(name: str) -> Damage:
    """One bit of a file."""

    def damage(at: Path) -> None:
        data = bytearray((at / name).read_bytes())
        data[random.Random(name).randrange(len(data))] ^= 4
        (at / name).write_bytes(data)

    return damage


def cut(name: str, share: float) -> Damage:
    def damage(at: Path) -> None:
        os.truncate(at / name, int((at / name).stat().st_size * share))

    return damage


def longer(name: str) -> Damage:
    def damage(at: Path) -> None:
        with open(at / name, "ab") as file:
            file.write(b"\0")

    return damage


def gone(name: str) -> Damage:
    return lambda at: (at / name).unlink()


def directory(name: str) -> Damage:
    def damage(at: Path) -> None:
        (at / name).unlink()
        (at / name).mkdir()

    return damage


def link(name: str, target: str) -> Damage:
    """A link in place of a file: to nothing, to itself, to what gives errors when it is read."""

    def damage(at: Path) -> None:
        (at / name).unlink()
        (at / name).symlink_to(target)

    return damage


def text(name: str, content: str | bytes) -> Damage:
    def damage(at: Path) -> None:
        (at / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return damage


def of_both(damage: Damage) -> Damage:
    """The same to every checkpoint: the run begins again."""

    def twice(at: Path) -> None:
        for path in at.parent.glob("step-*"):
            damage(path)

    return twice


DAMAGES: dict[str, Damage] = {
    **{f"{name}: a bit": flipped(name) for name in FILES},
    **{f"{name}: cut": cut(name, 0.5) for name in FILES},
    **{f"{name}: empty": cut(name, 0.0) for name in FILES},
    **{f"{name}: a byte more": longer(name) for name in FILES if name != "manifest.json"},
    **{f"{name}: gone": gone(name) for name in FILES},
    **{f"{name}: a directory": directory(name) for name in FILES},
    **{f"{name}: a link to nothing": link(name, "nowhere") for name in FILES},
    **{f"{name}: a link to itself": link(name, name) for name in FILES},
    **{f"{name}: gives an error when read": link(name, "/proc/self/mem") for name in FILES},
    "manifest.json: {}": text("manifest.json", "{}"),
    "manifest.json: a list": text("manifest.json", "[]"),
    "manifest.json: nested": text("manifest.json", "[" * 200_000),
    "manifest.json: no text": text("manifest.json", b"\xff\xfe\0"),
    "manifest.json: huge": text("manifest.json", b" " * (17 << 20) + b"{}"),
    "a foreign file": lambda at: (at / "x\x1b[2J").write_text("x"),
    "an empty directory": lambda at: [path.unlink() for path in at.iterdir()],
    "a file of its name": lambda at: (shutil.rmtree(at), at.write_text("x")),
    "a newer one that is empty": lambda at: (at.parent / "step-99999999").mkdir(),
    "half of a newer one": lambda at: shutil.copytree(
        at, at.parent / "step-00000031", ignore=shutil.ignore_patterns("m*", "s*")
    ),
    "what a killed save left": lambda at: shutil.copytree(at, at.parent / "tmp-00000031"),
    "both: a bit of the weights": of_both(flipped("model.safetensors")),
    "both: no state": of_both(gone("state.json")),
    "both are gone": lambda at: [shutil.rmtree(path) for path in at.parent.glob("step-*")],
}
SILENT = ("what a killed save left", "both are gone")  # nothing to refuse


# ----------------------------------------------------------------------------------- what is forged


def sealed(at: Path) -> None:
    """Sums that belong to what is there now."""
    files = sorted(path for path in at.iterdir() if path.name != "manifest.json")
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    manifest = {
        path.name: {"bytes": path.stat().st_size, "sha256": sums[path.name]} for path in files
    }
    (at / "manifest.json").write_text(json.dumps(manifest))


def forged_state(change: Callable[[dict], object]) -> Damage:
    def damage(at: Path) -> None:
        state = json.loads((at / "state.json").read_text())
        changed = change(state)
        (at / "state.json").write_text(json.dumps(state if changed is None else changed))
        sealed(at)

    return damage


def forged_tensors(name: str, change: Callable[[dict], None]) -> Damage:
    def damage(at: Path) -> None:
        tensors = load_file(at / name)
        change(tensors)
        save_file(tensors, at / name)
        sealed(at)

    return damage


def lose_one(values: dict, holds: str = "") -> None:
    del values[next(key for key in values if holds in key)]


def reshape_one(values: dict, holds: str = "") -> None:
    key = next(key for key in values if holds in key)
    values[key] = torch.zeros(7)


def poison_one(values: dict, holds: str = "") -> None:
    key = next(key for key in values if holds in key and values[key].is_floating_point())
    values[key] = torch.full_like(values[key], float("nan"))


WEIGHTS = "model.safetensors"
TENSORS = "state.safetensors"
WRONG_VALUES = (
    *(("step", value) for value in ("x", -5, 10**12)),
    *(("executed", value) for value in (None, 10**12)),
    *(("data", value) for value in ({}, {"lanes": 1})),
    *(("rng", value) for value in ([], [[1, 2]])),
    *((key, value) for key, value in (("optimizer", []), ("config", []))),
)
FORGED: dict[str, Damage] = {
    "weights that lack one": forged_tensors(WEIGHTS, lose_one),
    "weights of another shape": forged_tensors(WEIGHTS, reshape_one),
    "weights that are not finite": forged_tensors(WEIGHTS, poison_one),
    "no generators": forged_tensors(TENSORS, lambda t: lose_one(t, "rng")),
    "generators of another size": forged_tensors(TENSORS, lambda t: reshape_one(t, "rng")),
    **{
        f"a state without {key}": forged_state(lambda state, key=key: state.pop(key) and None)
        for key in ("step", "executed", "data", "rng", "optimizer", "config", "revision")
    },
    **{
        f"a state whose {key} is {value!r}": forged_state(
            lambda state, key=key, value=value: state.update({key: value})
        )
        for key, value in WRONG_VALUES
    },
    "a state of another run": forged_state(lambda state: state["config"]["stage"].update(lr=9.0)),
    "a config of another model": lambda at: (
        (at / "config.json").write_text('{"architectures": ["Other"]}'),
        sealed(at),
    ),
}


# ------------------------------------------------------------------------------------------- cases


def base(folder: Path) -> tuple[Path, dict]:
    """A finished run with two checkpoints, and what came of it."""
    run = life.fresh(folder / "base") / "run"
    ended = life.begin([*WORDS, "--out", str(run)], folder / "base" / "said").end()
    if ended.status != 0:
        raise ValueError(f"{JOB.name} does not even run:\n{ended.said[-2000:]}")
    return run, life.outcome(run)


def little_memory() -> None:
    """What a checkpoint claims must not take the machine's memory."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def again_after(damage: Damage, whole: Path, wanted: dict, folder: Path) -> tuple[life.Ended, str]:
    """The same command on a damaged copy: how it ended, and what differs then."""
    place = life.fresh(folder / "case")
    shutil.copytree(whole, place / "run", symlinks=True)
    newest = max((place / "run" / "checkpoints").glob("step-*"))
    damage(newest)
    words = [*WORDS, "--out", str(place / "run")]
    ended = life.begin(words, place / "said", before=little_memory).end()
    other = life.difference(life.outcome(place / "run"), wanted) if ended.status == 0 else ""
    return ended, other


def seen_after_damage(ended: life.Ended, other: str, silent: bool) -> str:
    if ended.status != 0:
        return f"ended with {ended.status}"
    if other:
        return f"another {other}"
    return "equal" if silent or "REFUSED" in ended.said else "equal, but nothing was said"


def seen_after_forgery(ended: life.Ended, other: str) -> str:
    if ended.status is None:
        return "hung"
    if "\nTraceback" in ended.said:
        return "a traceback"
    if ended.status == 0:
        return "another run" if other else "as undisturbed"
    lines = [line for line in ended.said.splitlines() if line.startswith("error: ")]
    return "one line" if len(lines) == 1 and ended.status == 1 else f"ended with {ended.status}"


def run(count: int = 10**9) -> None:
    """All damages that the ledger does not have yet."""
    small.prepare()
    ledger = Ledger("damage")
    todo = [("damage", name, damage) for name, damage in DAMAGES.items()][:count]
    todo += [("forged", name, damage) for name, damage in FORGED.items()][:count]
    todo = [
        (kind, name, damage) for kind, name, damage in todo if f"{kind} {name}" not in ledger.done
    ]
    if not todo:
        return
    folder = FOLDER / "work" / "damage"
    whole, wanted = base(folder)
    for kind, name, damage in todo:
        ended, other = again_after(damage, whole, wanted, folder)
        if kind == "damage":
            seen = seen_after_damage(ended, other, name in SILENT)
        else:
            seen = seen_after_forgery(ended, other)
        row = ledger.add(f"{kind} {name}", seen=seen, said=ended.said[-1500:])
        print(row["case"], row["seen"], sep="  ", flush=True)


def rows() -> list[Row]:
    """A line for what is damaged, one for what is forged."""
    ledger = Ledger("damage")
    table = []
    damaged = ledger.of("damage ")
    if damaged:
        expected = "refused by name, the one before is used; equal bit for bit"
        table.append(row_of("a damaged checkpoint", damaged, expected, ("equal",)))
    forged = ledger.of("forged ")
    if forged:
        good = ("one line", "as undisturbed")
        table.append(
            row_of(
                "a forged checkpoint, with its sums",
                forged,
                "one line, or the run as undisturbed",
                good,
            )
        )
    return table
