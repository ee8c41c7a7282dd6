"""Readers: every dataset is messages with text and image parts, in another spelling.

What it teaches: a format is two questions. Where does a record lie (the container), and what does it say (its fields)? The
container answers with byte spans, which are all that is kept in memory: 32 bytes a record, shared by all worker processes. The
fields become one `Sample`. Nothing is fetched from the network and nothing outside the images' folder is opened.

    container                        fields
    .json .jsonl   an item, a line   conversations   LLaVA, ShareGPT, Qwen-VL, InternVL, MiniMind-V
    .tar           files of a name   messages        OpenAI, Hugging Face, LLaMA-Factory
    .parquet       a row             texts           FineVision and the_cauldron (turns), OBELICS (interleaved)
    .tsv           a line            prompt          verl's RL rows, with reward_model.ground_truth
                                     question        VLMEvalKit, image in base64, options A to D
                                     txt, json       captions and idl-wds pages inside .tar

A path may be a file, a folder of shards, a pattern ("shards/*.tar"), a mixture file or InternVL's meta JSON. A mixture file:

    {"datasets": {"ocr": {"data": "ocr/*.tar", "weight": 2.0, "max_tiles": 12}, "chat": {"data": "chat.jsonl", "images": "photos"}}}

Simplified: a shard must be a file that can be sought in; a parquet reader reads whole row groups, so keep them small (Hugging
Face writes 100 rows of images); text containers are parsed once at the start, to find faults and tasks.
"""
import base64
import binascii
import csv
import glob
import io
import json
import re
import tarfile
from array import array
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Iterator

import numpy as np
import torch

from data import THINKING, BadSample, Faults, Message, Sample, Video
from stream import Drawn, Order

MAX_BYTES = 1 << 26  # of one record, its images included
PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant", "system": "system"}
DESCRIBE, READ = "Describe the picture.", "Read the text in the picture."  # our questions to captions and pages without one
WRONG = (ValueError, RecursionError, LookupError, TypeError, AttributeError)  # what malformed fields raise


# ------------------------------------------------------------------------------------------------------------ containers

Span = tuple[int, int, int]  # first byte, byte after the last, and the record's number in its file, from 1


def line_spans(path: Path) -> Iterator[Span]:
    with open(path, "rb") as f:
        start = 3 if f.read(3) == b"\xef\xbb\xbf" else 0
        f.seek(start)
        for number, line in enumerate(f, 1):
            if line.strip():
                yield start, start + len(line), number
            start += len(line)


def item_spans(path: Path) -> Iterator[Span]:
    """Items of a JSON list, or lines when it is none. Read as Latin-1, a character is a byte, and JSON's own signs are the same."""
    with open(path, "rb") as f:
        if not f.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            yield from line_spans(path)
            return
    text, decoder, blank = path.read_text("latin-1"), json.JSONDecoder(), re.compile(r"[\s,]*")
    at, number = text.index("[") + 1, 0
    while (at := blank.match(text, at).end()) < len(text) and text[at] != "]":
        try:
            _, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as e:
            raise ValueError(f"{path}: not a JSON list ({e})") from e
        number += 1
        yield at, end, number
        at = end
    if at >= len(text):
        raise ValueError(f"{path}: not a JSON list (it does not end)")


def row_spans(path: Path) -> Iterator[Span]:
    """Lines of a TSV after its header; a quoted field may hold line breaks."""
    quotes = number = 0
    with open(path, "rb") as f:
        end = start = len(f.readline())
        for line in f:
            quotes, end = quotes + line.count(b'"'), end + len(line)
            if quotes % 2 == 0:
                number += 1
                yield start, end, number
                start = end
    if end > start:
        yield start, end, number + 1


def header(block: bytes) -> tarfile.TarInfo:
    return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")


def members(f) -> Iterator[tuple[str, int, int, int] | str]:
    """(name, start, data, end) of each file in a tar, from the file's position; a string tells of damage, which is searched
    block by block for the next header. tarfile itself ends in silence there."""
    at, size, name = f.tell(), f.seek(0, 2), None
    start, broken = at, False
    while True:
        f.seek(at)
        block = f.read(512)
        if len(block) < 512:
            yield "it ends without an end mark"
        if len(block) < 512 or not block.strip(b"\0"):
            return
        try:
            info = header(block)
        except tarfile.HeaderError as e:
            if not broken:
                yield f"bad header at byte {at} ({e})"
            broken, name, at = True, None, at + 512
            start = at
            continue
        data, broken = at + 512, False
        at = data + (info.size + 511) // 512 * 512
        if data + info.size > size:
            yield f"{info.name} is cut short"
            return
        if info.type in (b"L", b"x"):  # the next file's name is too long for its header
            body = f.read(info.size)
            found = re.search(rb"\d+ path=(.*)\n", body) if info.type == b"x" else re.match(rb"([^\0]*)", body)
            name = found.group(1).decode("utf-8", "replace") if found else name
            continue
        if info.isreg():
            yield name or info.name, start, data, data + info.size
        start, name = at, None


def key_of(name: str) -> tuple[str, str]:
    """WebDataset's rule: the path up to the first dot of the file's name is the sample, the rest says what it is."""
    folder, _, base = name.rpartition("/")
    stem, _, kind = base.partition(".")
    return f"{folder}/{stem}", kind.lower()


def group_spans(path: Path) -> Iterator[Span | BadSample]:
    """Neighbouring files of one key. Damage is one fault, together with the sample that it leaves incomplete."""
    key, kinds, start, end, number, damage = None, set(), 0, 0, 0, False

    def whole() -> bool:
        return bool(kinds & {"txt", "json"}) and bool(kinds & {*PICTURES, "pdf", "tif"})

    with open(path, "rb") as f:
        for found in members(f):
            if isinstance(found, str):
                if key is not None and whole():
                    yield start, end, number
                key, kinds, damage = None, set(), True
                yield BadSample("damaged tar", f"{path.name}: {found}")
                continue
            name, a, _, b = found
            here, kind = key_of(name)
            if here != key:
                if key is not None:
                    if whole() or not damage:
                        yield start, end, number
                    damage = False
                key, kinds, start, number = here, set(), a, number + 1
            kinds.add(kind)
            end = b
    if key is not None and (whole() or not damage):
        yield start, end, number


def parquet(path: Path):
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as e:
        raise ValueError(f"{path}: parquet files need pyarrow: pip install pyarrow") from e
    return ParquetFile(path)


def parquet_spans(path: Path) -> Iterator[Span]:
    """Not bytes but row group and row in it."""
    metadata, number = parquet(path).metadata, 0
    for g in range(metadata.num_row_groups):
        for i in range(metadata.row_group(g).num_rows):
            number += 1
            yield g, i, number


@lru_cache(4)
def row_group(path: Path, group: int):
    return parquet(path).read_row_group(group)


def strict_json(text: str):
    """JSON without NaN and infinities, which would be numbers nobody wrote."""
    def refuse(name: str):
        raise ValueError(f"{name} is no JSON number")
    return json.loads(text, parse_constant=refuse)


def fields_of(path: Path, a: int, b: int) -> dict:
    """The record at a span, as a dictionary. Raises ValueError (or RecursionError) when it cannot be read."""
    kind = path.suffix
    if kind == ".parquet":
        return row_group(path, a).slice(b, 1).to_pylist()[0]
    if b - a > MAX_BYTES:
        raise ValueError(f"a record of {b - a} bytes; the limit is {MAX_BYTES}")
    with open(path, "rb") as f:
        f.seek(a)
        raw = f.read(b - a)
        if kind == ".tar":
            files = [m for m in members(io.BytesIO(raw)) if not isinstance(m, str)]
            return {key_of(name)[1]: raw[data:end] for name, _, data, end in files} | {"__key__": key_of(files[0][0])[0]}
        if kind == ".tsv":
            f.seek(0)
            names = f.readline().decode("utf-8-sig").rstrip("\r\n").split("\t")
            csv.field_size_limit(MAX_BYTES)
            row, = csv.reader(io.StringIO(raw.decode("utf-8"), newline=""), delimiter="\t")
            return dict(zip(names, row, strict=True))
    return strict_json(raw.decode("utf-8"))


SPANS = {".jsonl": item_spans, ".json": item_spans, ".tsv": row_spans, ".tar": group_spans, ".parquet": parquet_spans}
CHEAP = (".jsonl", ".json", ".tsv")  # parsed once at the start; pictures in the others make that too dear


# ---------------------------------------------------------------------------------------------------------------- fields

def picture(value):
    """An image as datasets spell it: path, bytes, {bytes, path}, {url: ...}, data URL. Returns bytes or a Path."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path") or value.get("url") or value.get("image")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise TypeError(f"an image cannot be {type(value).__name__}")
    if value.startswith("data:"):
        return base64.b64decode(value.partition(",")[2], validate=True)
    if re.match(r"https?://", value):
        raise BadSample("remote image", value[:100])
    return Path(value)


def listed(value) -> list:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def dialogue(turns: list[tuple[str, str]], images: list, videos: list = ()) -> tuple[Message, ...]:
    """Turns of (role, text) with <image> and <video> marks in the user's texts, and what the marks stand for, in order."""
    queues = {"<image>": [picture(i) for i in images], "<video>": [film(v) for v in videos]}
    asked = [i for i, (role, _) in enumerate(turns) if role == "user"]
    for mark, queue in queues.items():
        count = sum(turns[i][1].count(mark) for i in asked)
        if count == 0 and len(queue) == 1 and asked:  # a lone image without a mark goes first
            turns[asked[0]], count = ("user", f"{mark}\n{turns[asked[0]][1]}"), 1
        if count != len(queue):
            raise BadSample("wrong placeholder count", f"{count} {mark} marks for {len(queue)}")
    messages = []
    for role, text in turns:
        text.encode()  # refuses lone surrogates
        think = None
        if role == "assistant" and (m := THINKING.fullmatch(text)):
            think, text = m.groups()
        if not text.strip() and think is None:
            raise BadSample("empty answer" if role == "assistant" else "empty question", "a turn without text or image")
        pieces = re.split("(<image>|<video>)", text) if role == "user" else [text]
        messages.append(Message(role, tuple(queues[p].pop(0) if p in queues else p for p in pieces if p), think))
    return answered(tuple(messages))


def film(value) -> Video:
    return Video(tuple(picture(v) for v in value) if isinstance(value, list) else picture(value))


def answered(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    if not any(m.role == "assistant" for m in messages):
        raise BadSample("no answer", "no assistant turn")
    return messages


def conversations(row: dict) -> tuple[Message, ...]:
    said = strict_json(row["conversations"]) if isinstance(row["conversations"], str) else row["conversations"]
    turns = [(ROLES[t.get("from") or t["role"]], t["value"] if "value" in t else t["content"]) for t in said]
    if isinstance(row.get("system"), str) and row["system"]:
        turns.insert(0, ("system", row["system"]))
    images = next((row[k] for k in ("image", "images", "image_bytes") if row.get(k)), None)
    videos = row.get("videos") if "videos" in row else [row["video"]] if row.get("video") else []
    return dialogue(turns, listed(images), listed(videos))


def chat(row: dict, field: str = "messages") -> tuple[Message, ...]:
    """Content is a text with marks, or a list of typed parts; a part without a value of its own takes the next of `images`."""
    if all(isinstance(m["content"], str) for m in row[field]):
        return dialogue([(ROLES[m["role"]], m["content"]) for m in row[field]], listed(row.get("images")), listed(row.get("videos")))
    spare, turns, images, videos = listed(row.get("images")), [], [], []
    for m in row[field]:
        text = ""
        for part in [{"type": "text", "text": m["content"]}] if isinstance(m["content"], str) else m["content"]:
            if part["type"] == "text":
                text += re.sub("<(?=(image|video)>)", "< ", part["text"])  # here a mark would be only words
            elif part["type"] == "video":
                text, _ = text + "<video>", videos.append(part.get("video") or part["path"])
            else:
                own = next((part[k] for k in ("image", "image_url", "path", "url") if part.get(k)), None)
                text, _ = text + "<image>", images.append(own if own is not None else spare.pop(0))
        turns.append((ROLES[m["role"]], text))
    return dialogue(turns, images + spare, videos)


def texts(row: dict, least: int = 0) -> tuple[Message, ...]:
    """FineVision, the_cauldron: turns of {user, assistant}, rated 1 to 5 in FineVision; OBELICS: texts and images in turn."""
    if all(t is None or isinstance(t, str) for t in row["texts"]):
        pairs = list(zip(row["images"], row["texts"], strict=True))
        if any((i is None) == (t is None) for i, t in pairs):
            raise BadSample("malformed record", "an interleaved place holds an image or a text, not both and not none")
        return (Message("assistant", tuple(picture(i) if t is None else t for i, t in pairs)),)
    ratings = [row[k] for k in row if k.endswith("_ratings") and row[k]]
    kept = [t for i, t in enumerate(row["texts"]) if all(r[i] is None or r[i] >= least for r in ratings)]
    if not kept:
        raise BadSample("rated too low", f"no turn is rated {least} or more in everything")
    images = listed(row.get("images"))
    turns = [(role, t[role].replace("<image>", "")) for t in kept for role in ("user", "assistant")]
    turns[0] = ("user", "<image>" * len(images) + "\n" * bool(images) + turns[0][1])
    return dialogue(turns, images)


def question(row: dict) -> tuple[Message, ...]:
    options = "".join(f"\n{k}. {row[k]}" for k in "ABCDEFGH" if row.get(k))
    hint = f"Hint: {row['hint']}\n" if row.get("hint") else ""
    ask = f"{hint}{row['question']}{options}" + "\nAnswer with the letter." * bool(options)
    image = base64.b64decode(row["image"], validate=True) if row.get("image") else row["image_path"]
    return (Message("user", (picture(image), "\n" + ask)), *dialogue([("assistant", row["answer"])], []))


def shard(row: dict) -> tuple[Message, ...]:
    """Files of one key. A JSON sidecar may hold a conversation, a caption, or the pages of a document (idl-wds)."""
    images = [row[k] for k in row if k in PICTURES]
    side = strict_json(row["json"].decode("utf-8")) if "json" in row else {}
    for known, read in (("conversations", conversations), ("messages", chat)):
        if known in side:
            return read(side | {"images": images, "image": None})
    if not images:
        raise BadSample("no picture", f"{row['__key__']} has none of {', '.join(PICTURES)} (PDF and TIFF are not rendered)")
    if "pages" in side:
        page = side["pages"][0]  # pdfa: lines under "lines"; idl: at the page itself
        ask, answer = READ, "\n".join(page.get("lines", page)["text"])
    else:
        ask, answer = DESCRIBE, row["txt"].decode("utf-8") if "txt" in row else side["caption"]
    return dialogue([("user", "<image>\n" + ask), ("assistant", answer)], images[:1])


def to_sample(row: dict, origin: str, root: Path, d: "Dataset") -> Sample:
    """Fields -> Sample. Raises BadSample."""
    try:
        facts = row.get("facts")
        if "__key__" in row:
            messages = shard(row)
        elif "conversations" in row:
            messages = conversations(row)
        elif "messages" in row:
            messages = chat(row)
        elif "texts" in row:
            messages = texts(row, d.min_rating)
        elif "prompt" in row:
            facts = {"answer": str(row["reward_model"]["ground_truth"])}
            messages = chat(row | {"prompt": [*row["prompt"], {"role": "assistant", "content": facts["answer"]}]}, "prompt")
        elif "question" in row:
            messages = question(row)
        else:
            raise KeyError(f"none of conversations, messages, texts, prompt, question among {', '.join(map(str, row))[:100]}")
        task = row.get("task") or d.task or (row.get("data_source") if "prompt" in row else "") or ""
        if facts is None and "facts" not in row:
            facts = {"answer": "".join(p for p in messages[-1].parts if isinstance(p, str))}
        if not isinstance(task, str) or not isinstance(facts, dict):
            raise TypeError("`task` must be a string and `facts` an object")
    except BadSample as e:
        raise BadSample(e.reason, f"{origin}: {e.args[1]}") from e
    except (*WRONG, binascii.Error) as e:
        raise BadSample("malformed record", f"{origin}: {type(e).__name__} {e}"[:300]) from e
    return Sample(messages, task, origin, facts, root, d.max_tiles)


# --------------------------------------------------------------------------------------------------------------- sources

@dataclass(frozen=True)
class Dataset:
    """One entry of a mixture. weight: how often it is drawn (0: by its size, times `repeat`); epochs: how often it may be read
    (0: without end); cap: at most so many of its records, a share of them when below 1 (0: all), evenly spaced; max_tiles: for
    all images of a sample together (0: as the model); min_rating: FineVision's turns below it are left out."""
    data: str
    images: str = ""
    weight: float = 0.0
    epochs: float = 0.0
    cap: float = 0.0
    repeat: float = 1.0
    task: str = ""
    max_tiles: int = 0
    min_rating: int = 0

    @cached_property
    def files(self) -> list[Path]:
        path = Path(self.data)
        found = [p for p in path.iterdir() if p.suffix in SPANS] if path.is_dir() else [path] if path.is_file() else [
            Path(p) for p in glob.glob(self.data, recursive=True)]
        if not found or any(p.suffix not in SPANS for p in found):
            raise ValueError(f"--data {self.data}: no such file, folder or pattern of {', '.join(SPANS)} files")
        return sorted(found)

    def root(self, file: Path) -> Path:
        """Where the image paths of one of its files start."""
        return Path(self.images) if self.images else file.parent


def mixture_of(path: Path, images=None) -> list[Dataset]:
    """The datasets that a path stands for: those of a mixture file or an InternVL meta JSON, else the path itself."""
    if path.suffix == ".json" and path.is_file():
        with open(path, "rb") as f:
            listed = f.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] != b"{"
        meta = {} if listed else read_meta(path)
        if meta:
            return meta
    return [Dataset(str(path), str(images or ""))]


def read_meta(path: Path) -> list[Dataset]:
    try:
        meta = strict_json(path.read_text("utf-8-sig"))
    except (ValueError, RecursionError):
        return []  # JSON lines
    known, here = {f.name for f in fields(Dataset)}, path.parent
    if "datasets" in meta:
        entries = meta["datasets"]
        for name, entry in entries.items():
            if wrong := set(entry) - known or {"data"} - set(entry):
                raise ValueError(f"{path}: dataset {name!r}: {sorted(wrong)[0]!r} is unknown or missing; "
                                 f"keys are {', '.join(sorted(known))}")
    elif meta and all(isinstance(e, dict) and "annotation" in e for e in meta.values()):
        wanted = ("root", "annotation", "repeat_time", "max_dynamic_patch", "length", "data_augment")
        for name, e in meta.items():
            if wrong := set(e) - set(wanted):
                raise ValueError(f"{path}: dataset {name!r}: unknown key {sorted(wrong)[0]!r}; keys are {', '.join(wanted)}")
        entries = {}
        for name, e in meta.items():
            times = e.get("repeat_time", 1)  # below 1 it is a share
            entries[name] = {"data": e["annotation"], "images": e.get("root", ""), "max_tiles": e.get("max_dynamic_patch", 0),
                             "cap": times if times < 1 else 0, "repeat": max(1.0, times)}
    else:
        return []
    return [Dataset(**(e | {"data": str(here / e["data"])} | ({"images": str(here / e["images"])} if e.get("images") else {})))
            for e in entries.values()]


class Folder:
    """A user's data as a source: `stream` for training, `first` to look at. Its records stay on disk; spans are kept.

    Raises ValueError when nothing can be used. `faults` counts what the first look finds; the rest is counted when it is read.
    """

    def __init__(self, path, images=None, strict: bool = False):
        self.path, self.faults = Path(path), Faults(strict)
        self.datasets = mixture_of(self.path, images)
        self.root = self.datasets[0].root(self.datasets[0].files[0]) if len(self.datasets) == 1 else None
        self.files, spans, self.groups = [], array("q"), {}
        for k, d in enumerate(self.datasets):
            first, tasks, names = len(spans) // 4, array("q"), {}  # of each record its task, as a number
            for file in d.files:
                for span in SPANS[file.suffix](file):
                    task = self.look(file, span, d)
                    if task is not None:
                        tasks.append(names.setdefault(task, len(names)))
                        spans.extend((len(self.files), *span))
                self.files.append((file, k))
            most = int(d.cap if d.cap >= 1 else d.cap * len(tasks)) or len(tasks)
            kept = torch.arange(min(most, len(tasks))) * len(tasks) // max(1, min(most, len(tasks)))
            of = torch.from_numpy(np.array(tasks))[kept]
            self.groups |= {(k, task): first + kept[of == number] for task, number in names.items() if (of == number).any()}
        if not spans:
            raise ValueError(f"{self.path}: 0 usable samples\n{self.faults.report()}")
        self.spans = torch.from_numpy(np.array(spans)).view(-1, 4)  # tensors, so that worker processes share them

    def look(self, file: Path, span, d: Dataset) -> str | None:
        """The task of a record, None when it cannot be used. Counts the fault."""
        found = span if isinstance(span, BadSample) else read(file, *span, d) if file.suffix in CHEAP else None
        if isinstance(found, BadSample):
            self.faults.add(found)
            return None
        return found.task if found else d.task

    def __getitem__(self, i: int) -> Sample | BadSample:
        file, *span = self.spans[i].tolist()
        path, k = self.files[file]
        return read(path, *span, self.datasets[k])

    def __len__(self) -> int:
        return len(self.spans)

    def first(self, most: int = 0) -> list[Sample]:
        """The first usable ones, or all: for grading and small files. Pixels stay on disk unless the container holds them."""
        found: list[Sample] = []
        for i in range(len(self)):
            if isinstance(sample := self[i], Sample):
                found.append(sample)
            else:
                self.faults.add(sample)
            if len(found) == most:
                break
        return found

    def stream(self, mixture: dict[str, float], seed: int, turns: int = 0) -> "Picked":
        """Tasks named in the mixture are drawn by weight; data without any of those tasks is drawn by the datasets' weights.
        `turns` is for sources that make their questions: a file has those that it has."""
        tasks, keys = {t for _, t in self.groups}, list(self.groups)
        if tasks & set(mixture):
            parts = {t: [k for k in keys if k[1] == t] for t in mixture if t in tasks and mixture[t] > 0}
            weights = [mixture[t] for t in parts]
        else:
            parts = {k: found for k in range(len(self.datasets)) if (found := [key for key in keys if key[0] == k])}
            weights = [self.datasets[k].weight or self.datasets[k].repeat * sum(len(self.groups[key]) for key in found)
                       for k, found in parts.items()]
        records = [torch.cat([self.groups[key] for key in found]) for found in parts.values()]
        epochs = [[self.datasets[k].epochs for k, _ in found] for found in parts.values()]
        return Picked(self, Order(records, weights, [max(e) if min(e) else 0 for e in epochs], seed))


class Picked(Drawn):
    """The stream of a folder: sample n is the record that the order has there; bad ones are passed over by `next`."""

    def __init__(self, folder: Folder, order: Order):
        super().__init__(None)
        self.folder, self.order, self.endless = folder, order, order.endless

    def __getitem__(self, n: int) -> Sample | BadSample | None:
        found = self.order[n]
        return None if found is None else self.folder[found[1]]

    def __next__(self) -> Sample:
        while True:
            try:
                found = super().__next__()
            except IndexError:
                raise StopIteration from None
            if isinstance(found, BadSample):
                self.folder.faults.add(found)
            elif found is not None:
                return found


def read(path: Path, a: int, b: int, number: int, d: Dataset) -> Sample | BadSample:
    origin = f"{path.name}:{number}"
    try:
        return to_sample(fields_of(path, a, b), origin, d.root(path), d)
    except BadSample as e:
        return e
    except (OSError, *WRONG) as e:
        return BadSample("malformed record", f"{origin}: {type(e).__name__} {e}"[:300])
