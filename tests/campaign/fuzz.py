"""Hostile input: mutated files, texts and configurations, under an audit of what is opened and started.

What it teaches: three promises about everything that is read. Only *declared* errors come out (a
counted fault, or a ValueError that names the file). Nothing *outside* is touched: an audit hook, which
Python calls at every file that is opened, every socket and every process that is started, and which no
code can take off again, watches. And every case is *bounded* in seconds and memory.

    python -m tests.campaign --only fuzz --count 500 --targets tar parquet

    seed ── mutate(n) ── the real reader ── sample | fault | declared error
                              └─ audit hook, clock, memory

Case n of a target is always the same: `python -m tests.campaign.fuzz tar 1234` runs that one alone.
"""

import base64
import copy
import io
import json
import mmap
import os
import random
import resource
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable

import torch
from PIL import Image

import graders
from data import world
from data.encode import Encoder
from data.images import frames_of, open_image
from data.readers import Folder
from data.sample import BadSample, Message, Video
from infra.judge import JUDGE
from recipe import THINK
from tests.campaign.ledger import ROOT, Ledger, Row
from tokenizer import ADDED, Tokenizer, train_bpe
from vlm import PRESETS, SailVL

CASES = 20_000  # of each target
CHUNK = 500  # cases that are remembered together
SECONDS = 10.0  # of processor time, for one case
WARM = 20  # cases before the audit: what is imported late is imported there
SILENCE = 120.0  # seconds without a finished case: it hangs in C
MEMORY = 512 << 20  # bytes that one case may add to the largest size so far
SPACE = 4 << 30  # bytes of address space on top of what a worker starts with


class TooSlow(BaseException):
    """A case's processor time is over. No Exception: nothing that collects faults may swallow it."""


# ------------------------------------------------------------------------------------------ the audit


class Audit:
    """Notes every file outside of some folders, every connection and every process, from now on."""

    STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "pty.spawn")
    CHANGES = (
        "os.remove",
        "os.rename",
        "os.rmdir",
        "os.chmod",
        "os.symlink",
        "os.link",
        "os.truncate",
    )
    RUNS = ("pickle.find_class", "code.__new__", "ctypes.dlopen")

    def __init__(self, home: Path):
        self.home = os.path.realpath(home)
        libraries = (
            sys.prefix,
            sys.base_prefix,
            os.path.dirname(torch.__file__),
            "/usr/share",
            "/usr/lib",
        )
        self.readable = tuple({os.path.realpath(folder) for folder in libraries})
        self.readable += ("/proc/self", "/dev/null", "/dev/urandom", "/etc/localtime", "/sys/")
        self.found: list[str] = []
        self.awake = True
        sys.addaudithook(self.hear)

    def hear(self, event: str, arguments: tuple) -> None:
        if not self.awake:
            return
        if event == "open":
            self.opened(*arguments[:3])
        elif event in self.CHANGES and not self.inside(arguments[0]):
            self.found.append(f"{event} {arguments[0]!r:.100}")
        elif event.startswith("socket.") and event not in ("socket.__new__", "socket.gethostname"):
            self.found.append(f"{event} {arguments[1:]!r:.100}")
        elif event in self.STARTS or event in self.RUNS:
            self.found.append(f"{event} {arguments!r:.100}")
        elif event == "exec" and arguments[0].co_filename == "<string>":
            self.found.append(f"exec {arguments[0].co_names!r:.100}")

    def opened(self, path, mode, flags) -> None:
        if isinstance(path, int):
            return
        writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) if flags else "w" in str(mode)
        if self.inside(path):
            return
        real = os.path.realpath(os.fsdecode(path))
        source = real.startswith(str(ROOT)) and real.endswith((".py", ".pyc"))
        if writes or not (real.startswith(self.readable) or source):
            self.found.append(f"open {real!r:.100}")

    def inside(self, path) -> bool:
        real = os.path.realpath(os.fsdecode(path))
        return real == self.home or real.startswith(self.home + os.sep)


# ----------------------------------------------------------------------------------------- mutation

SIGNS = (
    b'"',
    b"[",
    b"]",
    b"{",
    b"}",
    b",",
    b":",
    b"\t",
    b"\n",
    b"\r",
    b"\0",
    b"\xff",
    b"-",
    b"../",
)
SIGNS += (
    b"1e999",
    b"NaN",
    b"null",
    b"true",
    b"\\ud800",
    b"<image>",
    b"\xef\xbb\xbf",
    b"/etc/passwd",
)
SIGNS += (b"http://127.0.0.1:9/", b"%s", b"\x1b[2J", b"9" * 400, b"[" * 3000)


def mutated(body: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, inserted, doubled, lost."""
    data = bytearray(body)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        at = rng.randrange(len(data) + 1)
        choice = rng.randrange(7)
        if choice == 0 and data:
            data[min(at, len(data) - 1)] ^= 1 << rng.randrange(8)
        elif choice == 1:
            data[at:at] = rng.choice(SIGNS)
        elif choice == 2:
            del data[at : at + rng.choice((1, 2, 8, 512))]
        elif choice == 3:
            data[at:at] = data[at : at + rng.randrange(60)]
        elif choice == 4:
            data[at : at + 4] = rng.choice((b"\xff" * 4, bytes(4), b"\x80\0\0\0", b"9999"))
        elif choice == 5:
            other = rng.randrange(len(data) + 1)
            data[at : at + 16], data[other : other + 16] = (
                data[other : other + 16],
                data[at : at + 16],
            )
        elif rng.random() < 0.2:
            del data[at:]
    return bytes(data)


ODD_VALUES = (
    None,
    True,
    0,
    -1,
    1.5,
    1e308,
    2**70,
    10**400,
    "",
    "../..",
    "/",
    "x" * 5000,
    "NaN",
    [],
    {},
    [[]],
)


def odd_json(value: Any, rng: random.Random) -> bytes:
    """A JSON value with some of its parts replaced, renamed, doubled, nested or gone."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2, 4))):
        place = value
        while isinstance(place, (dict, list)) and place:
            key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
            deeper = isinstance(place[key], (dict, list)) and place[key] and rng.random() < 0.7
            if deeper:
                place = place[key]
                continue
            change(place, key, rng)
            break
    text = json.dumps(value)
    return mutated(text.encode(), rng) if rng.random() < 0.2 else text.encode()


def change(place: dict | list, key, rng: random.Random) -> None:
    choice = rng.randrange(6)
    if choice < 3:
        place[key] = copy.deepcopy(rng.choice(ODD_VALUES))
    elif choice == 3:
        place[key] = [place[key]] * rng.choice((1, 2, 50))
    elif choice == 4 and isinstance(place, dict):
        place[rng.choice(("x", "", "data", "num_hidden_layers", "facts"))] = place.pop(key)
    else:
        del place[key]


PIECES = (
    "\\boxed{",
    "}",
    "{",
    "<think>",
    "</think>",
    "<|im_end|>",
    "<|im_start|>user\n",
    "<IMG_CONTEXT>",
)
PIECES += (
    "\\frac{1}{2}",
    "\\sqrt",
    "^",
    "_",
    "\\left(",
    "\\right)",
    "(",
    ")",
    "[",
    "]",
    ",",
    "1",
    "0",
    "9" * 50,
)
PIECES += (
    "1e9999",
    "-",
    "+",
    "*",
    "/",
    "!",
    "%",
    "$",
    ".",
    " ",
    "\n",
    "\0",
    "\u202e",
    "\u0301",
    "é",
    "Ω",
    "x",
)
PIECES += (
    "A",
    "B.",
    "yes",
    "no",
    "the answer is ",
    "10^{8}",
    "!!",
    "\\text{",
    "\\pi",
    "°",
    "kg",
    "=",
    "<",
    "|",
)
PIECES += (
    "[10, 20, 30, 40]",
    "<box>",
    "NaN",
    "inf",
    "the red circle",
    "a cat on a mat",
    "((",
    "))" * 20,
)


def text_of_pieces(rng: random.Random) -> str:
    """What a model might say, and what an attacker would."""
    length = rng.choice((1, 3, 8, 20, 20, 60, 60, 400))
    text = "".join(rng.choice(PIECES) for _ in range(length))
    return text * (40 if rng.random() < 0.05 else 1)


# ------------------------------------------------------------------------------------------- targets


@dataclass
class Target:
    """What is fed, and to whom. prepare(folder) -> seeds; work(folder, seed, rng) -> what became of it."""

    name: str
    prepare: Callable[[Path], list]
    work: Callable[[Path, Any, random.Random], str]


def png(color=(200, 30, 30), size=(32, 32), kind: str = "PNG", frames: int = 1) -> bytes:
    file = io.BytesIO()
    drawn = [Image.new("RGB", size, (color[0], color[1], n * 9)) for n in range(frames)]
    more = {"save_all": True, "append_images": drawn[1:]} if frames > 1 else {}
    drawn[0].save(file, kind, **more)
    return file.getvalue()


def chat(question: str, answer: str, **more) -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns} | more


def records() -> list[dict]:
    """A record of every format."""
    content = [{"type": "image", "image": "red.png"}, {"type": "text", "text": "?"}]
    typed = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": "<think>h</think>x"},
    ]
    prompt = [{"role": "user", "content": "<image>2+2?"}]
    return [
        chat("<image>\nwhat?", "red", image="red.png"),
        {"messages": typed, "task": "t", "facts": {"answer": ["a", 1], "grader": "number"}},
        {"question": "what?", "image": "red.png", "answer": "red", "choices": ["red", "blue"]},
        {"prompt": prompt, "images": ["red.png"], "reward_model": {"ground_truth": ["4", 4]}},
        {"images": ["red.png", None], "texts": [None, "x"]},
        chat("<video>\nwhat?", "red", video="clip.gif", id=7),
        {"texts": [{"user": "q", "assistant": "a", "relevance_ratings": 3}]},
    ]


def with_pictures(folder: Path) -> None:
    (folder / "red.png").write_bytes(png())
    (folder / "clip.gif").write_bytes(png(kind="GIF", frames=3))


def read_folder(path: Path, **how) -> str:
    """Everything that a run does with a file of data: index, read, draw, decode, encode."""
    try:
        folder = Folder(path, **how)
    except BadSample:
        raise
    except ValueError as error:
        if path.name not in str(error):
            raise
        return "declared error"
    samples = [sample for sample in folder.first(8)]
    stream = folder.stream({}, 0)
    samples += [stream[n] for n in range(2)]
    encoder = the_encoder()
    for sample in samples:
        if isinstance(sample, BadSample):
            continue
        try:
            replace(encoder, root=folder.root)(sample)
        except BadSample:
            return "fault"
    return "fault" if folder.faults.counts else "sample"


TOKENIZER: list[Tokenizer] = []


def the_tokenizer() -> Tokenizer:
    if not TOKENIZER:
        TOKENIZER.append(Tokenizer(train_bpe(world.corpus(60), 290), "", THINK))
    return TOKENIZER[0]


def the_encoder() -> Encoder:
    return Encoder(the_tokenizer(), PRESETS["toy"], max_length=4096)


def lines_seed(folder: Path) -> list[bytes]:
    with_pictures(folder)
    return ["\n".join(json.dumps(row) for row in records()).encode()]


def json_seeds(folder: Path) -> list[bytes]:
    with_pictures(folder)
    rows = records()
    return [json.dumps(rows, indent=1).encode(), json.dumps({"train": rows}).encode()]


def table_seed(folder: Path) -> list[bytes]:
    with_pictures(folder)
    picture = base64.b64encode(png()).decode()
    rows = ["index\timage\tquestion\tA\tB\tanswer", f'1\t{picture}\t"a ""b"" c"\tx\ty\tA']
    rows += [
        "2\t1\tq\tx\ty\tB",
        '3\t\t5" x\t\t\tz',
        "4\tred.png\tq\t\t\tz",
        "5\t['1', '2']\tq\t\t\tz",
    ]
    return ["\n".join(rows).encode()]


def tar_seed(folder: Path) -> list[bytes]:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for n, row in enumerate(records()[:3]):
            for kind, body in (("png", png()), ("txt", b"red"), ("json", json.dumps(row).encode())):
                member = tarfile.TarInfo(f"{n}.{kind}")
                member.size = len(body)
                archive.addfile(member, io.BytesIO(body))
    with_pictures(folder)
    return [file.getvalue()]


def parquet_seed(folder: Path) -> list[bytes]:
    import pyarrow as pa
    from pyarrow import parquet

    with_pictures(folder)
    seeds = []
    for compression in ("none", "zstd"):
        rows = [
            {"question": f"q{n}", "answer": "a", "image": {"bytes": png(), "path": None}}
            for n in range(4)
        ]
        file = io.BytesIO()
        parquet.write_table(
            pa.Table.from_pylist(rows), file, compression=compression, row_group_size=2
        )
        seeds.append(file.getvalue())
    return seeds


def of_file(suffix: str) -> Callable:
    """Mutate bytes of a file of data, and read it."""

    def work(folder: Path, seed: bytes, rng: random.Random) -> str:
        path = folder / f"mutant{suffix}"
        path.write_bytes(mutated(seed, rng))
        return read_folder(path)

    return work


def lines(folder: Path, seed: bytes, rng: random.Random) -> str:
    """JSON lines: bytes, or parts of their values."""
    path = folder / "mutant.jsonl"
    if rng.random() < 0.5:
        path.write_bytes(mutated(seed, rng))
    else:
        path.write_bytes(b"\n".join(odd_json(row, rng) for row in records()))
    return read_folder(path)


def pictures_seed(folder: Path) -> list[tuple[str, bytes]]:
    kinds = (("gif", "GIF", 5), ("webp", "WEBP", 3), ("png", "PNG", 3), ("png", "PNG", 1))
    return [(end, png(kind=kind, frames=n)) for end, kind, n in kinds] + [("jpg", png(kind="JPEG"))]


def pictures(folder: Path, seed: tuple[str, bytes], rng: random.Random) -> str:
    suffix, body = seed
    path = folder / f"mutant.{suffix}"
    path.write_bytes(mutated(body, rng))
    seen = "sample"
    for read in (lambda: open_image(path), lambda: frames_of(Video(path), None, "here")):
        try:
            read()
        except BadSample:
            seen = "fault"
    return seen


def mixture_seed(folder: Path) -> list[dict]:
    (folder / "good.jsonl").write_bytes(lines_seed(folder)[0])
    (folder.parent / "outside.jsonl").write_bytes(b'{"question": "q", "answer": "secret"}\n')
    entry = {
        "data": "good.jsonl",
        "images": ".",
        "weight": 2.0,
        "cap": 0.5,
        "max_tiles": 3,
        "epochs": 1,
    }
    entry |= {"task": "t", "max_frames": 4, "frames": "even"}
    meta = {
        "root": ".",
        "annotation": "good.jsonl",
        "repeat_time": 0.5,
        "max_dynamic_patch": 12,
        "length": 3,
    }
    return [{"datasets": {"a": entry, "b": {"data": "*.jsonl"}}}, {"a": meta}]


def mixture(folder: Path, seed: dict, rng: random.Random) -> str:
    path = folder / "mutant.json"
    path.write_bytes(odd_json(seed, rng))
    return read_folder(path)


def tokenizer_seed(folder: Path) -> list[tuple[str, bytes]]:
    the_tokenizer().save(folder)
    names = ("tokenizer.tiktoken", "tokenizer.json", "template.json")
    files = [(name, (folder / name).read_bytes()) for name in names]
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    return files + [("vocab.json", json.dumps(vocabulary).encode())]


def load_tokenizer(folder: Path, seed: tuple[str, bytes], rng: random.Random) -> str:
    """One file of a tokenizer's directory mutated; the template beside ranks that are whole."""
    name, body = seed
    place = folder / "tokenizer"
    place.mkdir(exist_ok=True)
    for left in place.iterdir():
        left.unlink()
    structured = name != "tokenizer.tiktoken" and rng.random() < 0.5
    (place / name).write_bytes(
        odd_json(json.loads(body), rng) if structured else mutated(body, rng)
    )
    if name == "template.json":
        shutil.copy(folder / "tokenizer.tiktoken", place)
    try:
        loaded = Tokenizer.load(place)
    except ValueError as error:
        if str(place) not in str(error):
            raise
        return "declared error"
    text = text_of_pieces(rng)
    if not loaded.nfc and loaded.decode(loaded.encode(text)) != text:
        raise AssertionError("a vocabulary that was accepted does not give the text back")
    return "sample"


def template_seed(folder: Path) -> list[str]:
    return ["" for _ in range(1)]


def template(folder: Path, seed: str, rng: random.Random) -> str:
    """Texts in every turn: the only control tokens are those of the template itself."""
    tokenizer = the_tokenizer()
    turns = []
    for n in range(rng.randrange(1, 5)):
        role = rng.choice(("user", "assistant", "system"))
        think = text_of_pieces(rng) if rng.random() < 0.3 else None
        turns.append(Message(role, (text_of_pieces(rng),), think))
    ids, learned = tokenizer.render(turns, [])
    control = Counter(i for i in ids if i in tokenizer.special.values())
    thoughts = sum(turn.think is not None for turn in turns)
    wanted = {tokenizer.special["<|im_start|>"]: len(turns), tokenizer.end: len(turns)}
    wanted |= {tokenizer.think: thoughts, tokenizer.unthink: thoughts} if thoughts else {}
    if control != wanted or len(ids) != len(learned):
        raise AssertionError(f"a text became a control token: {control} for {wanted}")
    text = turns[0].parts[0]
    if tokenizer.decode(tokenizer.encode(text)) != text:
        raise AssertionError("the text does not come back")
    return "sample"


def no_seed(folder: Path) -> list[None]:
    """The judge of expressions is a process of its own: it is there before the audit begins."""
    graders.symbolic_grading_available() and JUDGE.ask("x", "x")
    return [None]


def boxed(folder: Path, seed, rng: random.Random) -> str:
    """What is taken out of a text."""
    text = text_of_pieces(rng)
    found = graders.boxed(text)
    graders.split_think(text)
    answer = graders.final_answer(text)
    graders.choice_letter(text)
    graders.yes_or_no(text)
    graders.number(text)
    if found is not None and found not in text:
        raise AssertionError("a box holds what is not in the text")
    return "sample" if answer else "nothing"


def score(grader: str, rng: random.Random) -> str:
    truth = rng.choice(
        (text_of_pieces(rng), text_of_pieces(rng), 4, 2.5, True, None, ["a", None, "4"], [])
    )
    value = graders.grade(rng.choice((text_of_pieces(rng), None)), truth, grader)
    if not 0 <= value <= 1:
        raise AssertionError(f"a score of {value}")
    return "right" if value else "wrong"


def box(folder: Path, seed, rng: random.Random) -> str:
    said = text_of_pieces(rng)
    numbers = [
        rng.choice((0, 1, -5, 1e308, 10**30, 0.5, 1000, "nan", "x"))
        for _ in range(rng.randrange(6))
    ]
    truth = rng.choice((str(numbers), f"<box>{numbers}</box>", text_of_pieces(rng)))
    values = [graders.grade(said + truth, truth, name) for name in ("box", "iou")]
    if not all(0 <= value <= 1 for value in values):
        raise AssertionError(f"scores of {values}")
    return "right" if values[0] else "wrong"


def grader(folder: Path, seed, rng: random.Random) -> str:
    """Every grader; the two that ask math-verify's process less often, as a question takes its time."""
    slow = ("auto", "symbolic")
    quick = [name for name in graders.GRADERS if name not in slow]
    return score(rng.choice(slow) if rng.random() < 0.02 else rng.choice(quick), rng)


def model_seed(folder: Path) -> list[Path]:
    """The smallest model that there is."""
    toy = PRESETS["toy"]
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16}
    text = replace(toy.text, vocab_size=300, num_attention_heads=2, head_dim=8, **sizes)
    vision = replace(toy.vision, num_attention_heads=2, **sizes)
    SailVL(replace(toy, text=text, vision=vision)).init_weights(0).save_pretrained(folder / "model")
    return [folder / "model"]


def load_model(folder: Path, place: Path) -> str:
    try:
        model = SailVL.from_pretrained(place)
    except ValueError as error:
        if str(place) not in str(error):
            raise
        return "declared error"
    if not all(bool(torch.isfinite(p).all()) for p in model.parameters()):
        raise AssertionError("weights that are not finite were loaded")
    return "sample"


def config(folder: Path, seed: Path, rng: random.Random) -> str:
    place = folder / "mutant"
    place.mkdir(exist_ok=True)
    shutil.copy(seed / "model.safetensors", place)
    body = (seed / "config.json").read_bytes()
    changed = odd_json(json.loads(body), rng) if rng.random() < 0.8 else mutated(body, rng)
    (place / "config.json").write_bytes(changed)
    return load_model(folder, place)


def safetensors(folder: Path, seed: Path, rng: random.Random) -> str:
    """Mostly the header, which is JSON behind its length; else the numbers."""
    place = folder / "mutant"
    place.mkdir(exist_ok=True)
    shutil.copy(seed / "config.json", place)
    body = (seed / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(body[:8], "little")
    choice = rng.random()
    if choice < 0.4:
        header = odd_json(json.loads(body[8:end]), rng)
        body = len(header).to_bytes(8, "little") + header + body[end:]
    elif choice < 0.7:
        body = mutated(body[:end], rng) + body[end:]
    else:
        body = mutated(body, rng)
    (place / "model.safetensors").write_bytes(body)
    return load_model(folder, place)


TARGETS = {
    target.name: target
    for target in (
        Target("jsonl", lines_seed, lines),
        Target("json", json_seeds, of_file(".json")),
        Target("tsv", table_seed, of_file(".tsv")),
        Target("tar", tar_seed, of_file(".tar")),
        Target("parquet", parquet_seed, of_file(".parquet")),
        Target("pictures", pictures_seed, pictures),
        Target("mixture", mixture_seed, mixture),
        Target("tokenizer", tokenizer_seed, load_tokenizer),
        Target("template", template_seed, template),
        Target("boxed", no_seed, boxed),
        Target("box", no_seed, box),
        Target("grader", no_seed, grader),
        Target("config", model_seed, config),
        Target("safetensors", model_seed, safetensors),
    )
}
assert ADDED, "the tokens that no text may become"


# -------------------------------------------------------------------------------------------- a worker


def quiet_folder() -> str:
    """In memory where there is such a place: a case writes a file or two."""
    shm = Path("/dev/shm")
    return str(shm) if os.access(shm, os.W_OK) else tempfile.gettempdir()


def one_case(target: Target, folder: Path, seeds: list, n: int) -> str:
    """Case n: what became of it, in a word; an undeclared error is raised."""
    rng = random.Random(f"{target.name} {n}")
    return target.work(folder, rng.choice(seeds), rng)


def too_slow(*_) -> None:
    raise TooSlow


def chunk(
    target: Target, folder: Path, seeds: list, audit: Audit, start: int, count: int, board
) -> dict:
    """Some cases one after the other: what they became, and what must not have happened."""
    outcomes: Counter = Counter()
    problems: list[str] = []
    slowest = 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    largest = 0
    for n in range(start, start + count):
        board.seek(0)
        board.write(n.to_bytes(8, "little"))
        began = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            outcomes[one_case(target, folder, seeds, n)] += 1
        except TooSlow:
            problems.append(f"case {n}: over {SECONDS:g} s")
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(last.filename).name}:{last.lineno}"
            problems.append(f"case {n}: {type(error).__name__} {error!s:.120} ({place})")
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        slowest = max(slowest, time.process_time() - began)

        # what it touched and took
        problems += [f"case {n}: {what}" for what in audit.found]
        audit.found.clear()
        now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        largest = max(largest, now - peak)
        if (now - peak) << 10 > MEMORY:
            problems.append(f"case {n}: {(now - peak) >> 10} MiB")
        peak = now
    return {
        "seen": "problems" if problems else "clean",
        "cases": count,
        "outcomes": dict(outcomes),
        "problems": problems[:20],
        "slowest": round(slowest, 2),
        "memory": largest >> 10,
    }


def work_through(target: Target, chunks: list[tuple[int, int]], output: int, board) -> None:
    """In a worker: all chunks, a line of JSON for each."""
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGPROF, too_slow)
    with tempfile.TemporaryDirectory(dir=quiet_folder()) as place:
        folder = Path(place) / "home"
        folder.mkdir()
        seeds = target.prepare(folder)
        for n in range(WARM):
            try:
                one_case(target, folder, seeds, -1 - n)
            except (Exception, TooSlow):
                continue
        Image.init()
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + SPACE, used + SPACE))
        audit = Audit(folder)
        for start, count in chunks:
            found = chunk(target, folder, seeds, audit, start, count, board)
            os.write(output, (json.dumps({"start": start} | found) + "\n").encode())
        audit.awake = False


def in_worker(target: Target, chunks: list[tuple[int, int]], ledger: Ledger) -> None:
    """Chunks in a forked worker, written down as they come. One that hangs or dies costs its chunk."""
    while chunks:
        board = mmap.mmap(-1, 8)
        board[:] = chunks[0][0].to_bytes(8, "little")  # who dies before a case costs this chunk
        reader, writer = os.pipe()
        process = os.fork()
        if process == 0:
            os.close(reader)
            status = 1
            try:
                work_through(target, chunks, writer, board)
                status = 0
            except BaseException:
                traceback.print_exc()
            os._exit(status)
        os.close(writer)
        done = listen(process, reader, board, target, ledger)
        chunks = [piece for piece in chunks if piece[0] not in done]


def listen(process: int, reader: int, board, target: Target, ledger: Ledger) -> set[int]:
    """Write down what a worker says, until it ends; the starts of its finished chunks, lost one included."""
    os.set_blocking(reader, False)
    done: set[int] = set()
    unfinished = b""
    last = b""
    moved = time.monotonic()
    status = None
    while True:
        try:
            received = os.read(reader, 1 << 20)
        except BlockingIOError:
            received = None
        if received:
            *whole, unfinished = (unfinished + received).split(b"\n")
            for line in whole:
                found = json.loads(line)
                done.add(found["start"])
                report(ledger.add(f"{target.name} {found['start']}", **found))
        if received == b"":
            _, status = os.waitpid(process, 0)
            break
        if board[:] != last:
            last = board[:]
            moved = time.monotonic()
        if time.monotonic() - moved > SILENCE:
            os.kill(process, signal.SIGKILL)
        time.sleep(0.05)
    os.close(reader)
    if status:
        case = int.from_bytes(board[:], "little")
        start = case - case % CHUNK
        what = f"case {case}: the process hung or died ({os.waitstatus_to_exitcode(status)})"
        lost = {"seen": "problems", "cases": case - start + 1, "outcomes": {}, "problems": [what]}
        report(ledger.add(f"{target.name} {start}", slowest=0.0, memory=0, **lost))
        done.add(start)
    return done


def report(row: dict) -> None:
    print("fuzz", row["case"], row["seen"], *row["problems"][:3], sep="  ", flush=True)


def run(count: int = CASES, targets: tuple[str, ...] = tuple(TARGETS)) -> None:
    """The chunks of all targets that the ledger does not have."""
    ledger = Ledger("fuzz")
    for name in targets:
        starts = range(0, count, CHUNK)
        chunks = [(start, min(CHUNK, count - start)) for start in starts]
        todo = [
            (start, n) for start, n in chunks if not covered(ledger.done.get(f"{name} {start}"), n)
        ]
        in_worker(TARGETS[name], todo, ledger)


def covered(row: dict | None, cases: int) -> bool:
    return row is not None and (row["cases"] >= cases or row["seen"] == "problems")


def rows() -> list[Row]:
    """A line for each target."""
    ledger = Ledger("fuzz")
    table = []
    for name in TARGETS:
        found = ledger.of(f"{name} ")
        if not found:
            continue
        outcomes: Counter = Counter()
        for row in found:
            outcomes.update(row["outcomes"])
        problems = [problem for row in found for problem in row["problems"]]
        words = ", ".join(f"{n:,} {what}" for what, n in outcomes.most_common())
        words += f"; slowest {max(row['slowest'] for row in found):.1f} s"
        words += f", at most {max(row['memory'] for row in found)} MiB"
        if problems:
            words += f"; {len(problems)} PROBLEMS, first: {problems[0]}"
        expected = "samples, faults or declared errors; nothing outside"
        tried = sum(row["cases"] for row in found)
        table.append(Row(f"mutated {name}", tried, expected, words, not problems))
    return table


if __name__ == "__main__":
    name, n = sys.argv[1:]
    with tempfile.TemporaryDirectory() as place:
        home = Path(place) / "home"
        home.mkdir()
        print(one_case(TARGETS[name], home, TARGETS[name].prepare(home), int(n)))
