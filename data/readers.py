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
import glob
import re
from array import array
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from data.containers import CHEAP, PICTURES, SPANS, fields_of, strict_json
from data.sample import THINKING, BadSample, Faults, Message, Sample, Video
from data.stream import Drawn, Order

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
}
DESCRIBE, READ = (
    "Describe the picture.",
    "Read the text in the picture.",
)  # our questions to captions and pages without one
WRONG = (
    ValueError,
    RecursionError,
    LookupError,
    TypeError,
    AttributeError,
)  # what malformed fields raise


# ------------------------------------------------------------------------------------------------------------ containers


# ---------------------------------------------------------------------------------------------------------------- fields


def image_source(value):
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
    queues = {
        "<image>": [image_source(i) for i in images],
        "<video>": [video_source(v) for v in videos],
    }
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
            raise BadSample(
                "empty answer" if role == "assistant" else "empty question",
                "a turn without text or image",
            )
        pieces = re.split("(<image>|<video>)", text) if role == "user" else [text]
        messages.append(
            Message(role, tuple(queues[p].pop(0) if p in queues else p for p in pieces if p), think)
        )
    return answered(tuple(messages))


def video_source(value) -> Video:
    return Video(
        tuple(image_source(v) for v in value) if isinstance(value, list) else image_source(value)
    )


def answered(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    if not any(m.role == "assistant" for m in messages):
        raise BadSample("no answer", "no assistant turn")
    return messages


def from_conversations(row: dict) -> tuple[Message, ...]:
    said = (
        strict_json(row["conversations"])
        if isinstance(row["conversations"], str)
        else row["conversations"]
    )
    turns = [
        (ROLES[t.get("from") or t["role"]], t["value"] if "value" in t else t["content"])
        for t in said
    ]
    if isinstance(row.get("system"), str) and row["system"]:
        turns.insert(0, ("system", row["system"]))
    images = next((row[k] for k in ("image", "images", "image_bytes") if row.get(k)), None)
    videos = row.get("videos") if "videos" in row else [row["video"]] if row.get("video") else []
    return dialogue(turns, listed(images), listed(videos))


def from_messages(row: dict, field: str = "messages") -> tuple[Message, ...]:
    """Content is a text with marks, or a list of typed parts; a part without a value of its own takes the next of `images`."""
    if all(isinstance(m["content"], str) for m in row[field]):
        return dialogue(
            [(ROLES[m["role"]], m["content"]) for m in row[field]],
            listed(row.get("images")),
            listed(row.get("videos")),
        )
    spare, turns, images, videos = listed(row.get("images")), [], [], []
    for m in row[field]:
        text = ""
        for part in (
            [{"type": "text", "text": m["content"]}]
            if isinstance(m["content"], str)
            else m["content"]
        ):
            if part["type"] == "text":
                text += re.sub(
                    "<(?=(image|video)>)", "< ", part["text"]
                )  # here a mark would be only words
            elif part["type"] == "video":
                text, _ = text + "<video>", videos.append(part.get("video") or part["path"])
            else:
                own = next(
                    (part[k] for k in ("image", "image_url", "path", "url") if part.get(k)), None
                )
                text, _ = text + "<image>", images.append(own if own is not None else spare.pop(0))
        turns.append((ROLES[m["role"]], text))
    return dialogue(turns, images + spare, videos)


def from_texts(row: dict, least: int = 0) -> tuple[Message, ...]:
    """FineVision, the_cauldron: turns of {user, assistant}, rated 1 to 5 in FineVision; OBELICS: texts and images in turn."""
    if all(t is None or isinstance(t, str) for t in row["texts"]):
        pairs = list(zip(row["images"], row["texts"], strict=True))
        if any((i is None) == (t is None) for i, t in pairs):
            raise BadSample(
                "malformed record",
                "an interleaved place holds an image or a text, not both and not none",
            )
        return (Message("assistant", tuple(image_source(i) if t is None else t for i, t in pairs)),)
    ratings = [row[k] for k in row if k.endswith("_ratings") and row[k]]
    kept = [
        t for i, t in enumerate(row["texts"]) if all(r[i] is None or r[i] >= least for r in ratings)
    ]
    if not kept:
        raise BadSample("rated too low", f"no turn is rated {least} or more in everything")
    images = listed(row.get("images"))
    turns = [(role, t[role].replace("<image>", "")) for t in kept for role in ("user", "assistant")]
    turns[0] = ("user", "<image>" * len(images) + "\n" * bool(images) + turns[0][1])
    return dialogue(turns, images)


def from_question(row: dict) -> tuple[Message, ...]:
    options = "".join(f"\n{k}. {row[k]}" for k in "ABCDEFGH" if row.get(k))
    hint = f"Hint: {row['hint']}\n" if row.get("hint") else ""
    ask = f"{hint}{row['question']}{options}" + "\nAnswer with the letter." * bool(options)
    image = base64.b64decode(row["image"], validate=True) if row.get("image") else row["image_path"]
    return (
        Message("user", (image_source(image), "\n" + ask)),
        *dialogue([("assistant", row["answer"])], []),
    )


def from_tar_fields(row: dict) -> tuple[Message, ...]:
    """Files of one key. A JSON sidecar may hold a conversation, a caption, or the pages of a document (idl-wds)."""
    images = [row[k] for k in row if k in PICTURES]
    side = strict_json(row["json"].decode("utf-8")) if "json" in row else {}
    for known, read in (("conversations", from_conversations), ("messages", from_messages)):
        if known in side:
            return read(side | {"images": images, "image": None})
    if not images:
        raise BadSample(
            "no picture",
            f"{row['__key__']} has none of {', '.join(PICTURES)} (PDF and TIFF are not rendered)",
        )
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
            messages = from_tar_fields(row)
        elif "conversations" in row:
            messages = from_conversations(row)
        elif "messages" in row:
            messages = from_messages(row)
        elif "texts" in row:
            messages = from_texts(row, d.min_rating)
        elif "prompt" in row:
            facts = {"answer": str(row["reward_model"]["ground_truth"])}
            messages = from_messages(
                row
                | {"prompt": [*row["prompt"], {"role": "assistant", "content": facts["answer"]}]},
                "prompt",
            )
        elif "question" in row:
            messages = from_question(row)
        else:
            raise KeyError(
                f"none of conversations, messages, texts, prompt, question among {', '.join(map(str, row))[:100]}"
            )
        task = (
            row.get("task") or d.task or (row.get("data_source") if "prompt" in row else "") or ""
        )
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
        found = (
            [p for p in path.iterdir() if p.suffix in SPANS]
            if path.is_dir()
            else [path]
            if path.is_file()
            else [Path(p) for p in glob.glob(self.data, recursive=True)]
        )
        if not found or any(p.suffix not in SPANS for p in found):
            raise ValueError(
                f"--data {self.data}: no such file, folder or pattern of {', '.join(SPANS)} files"
            )
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
                raise ValueError(
                    f"{path}: dataset {name!r}: {sorted(wrong)[0]!r} is unknown or missing; "
                    f"keys are {', '.join(sorted(known))}"
                )
    elif meta and all(isinstance(e, dict) and "annotation" in e for e in meta.values()):
        wanted = (
            "root",
            "annotation",
            "repeat_time",
            "max_dynamic_patch",
            "length",
            "data_augment",
        )
        for name, e in meta.items():
            if wrong := set(e) - set(wanted):
                raise ValueError(
                    f"{path}: dataset {name!r}: unknown key {sorted(wrong)[0]!r}; keys are {', '.join(wanted)}"
                )
        entries = {}
        for name, e in meta.items():
            times = e.get("repeat_time", 1)  # below 1 it is a share
            entries[name] = {
                "data": e["annotation"],
                "images": e.get("root", ""),
                "max_tiles": e.get("max_dynamic_patch", 0),
                "cap": times if times < 1 else 0,
                "repeat": max(1.0, times),
            }
    else:
        return []
    return [
        Dataset(
            **(
                e
                | {"data": str(here / e["data"])}
                | ({"images": str(here / e["images"])} if e.get("images") else {})
            )
        )
        for e in entries.values()
    ]


class Folder:
    """A user's data as a source: `stream` for training, `first` to look at. Its records stay on disk; spans are kept.

    Raises ValueError when nothing can be used. `faults` counts what the first look finds; the rest is counted when it is read.
    """

    def __init__(self, path, images=None, strict: bool = False):
        self.path, self.faults = Path(path), Faults(strict)
        self.datasets = mixture_of(self.path, images)
        self.root = (
            self.datasets[0].root(self.datasets[0].files[0]) if len(self.datasets) == 1 else None
        )
        self.files, spans, self.groups = [], array("q"), {}
        for k, d in enumerate(self.datasets):
            first, tasks, names = (
                len(spans) // 4,
                array("q"),
                {},
            )  # of each record its task, as a number
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
            self.groups |= {
                (k, task): first + kept[of == number]
                for task, number in names.items()
                if (of == number).any()
            }
        if not spans:
            raise ValueError(f"{self.path}: 0 usable samples\n{self.faults.report()}")
        self.spans = torch.from_numpy(np.array(spans)).view(
            -1, 4
        )  # tensors, so that worker processes share them

    def look(self, file: Path, span, d: Dataset) -> str | None:
        """The task of a record, None when it cannot be used. Counts the fault."""
        found = (
            span
            if isinstance(span, BadSample)
            else read(file, *span, d)
            if file.suffix in CHEAP
            else None
        )
        if isinstance(found, BadSample):
            self.faults.add(found)
            return None
        return found.task if found else d.task

    def __getitem__(self, i: int) -> Sample | BadSample:
        file, *span = self.spans[i].tolist()
        path, k = self.files[file]
        return read(path, *span, self.datasets[k])

    def tasks(self) -> dict[str, int]:
        counts = {}
        for (_, task), records in self.groups.items():
            counts[task] = counts.get(task, 0) + len(records)
        return counts

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
            parts = {
                t: [k for k in keys if k[1] == t] for t in mixture if t in tasks and mixture[t] > 0
            }
            weights = [mixture[t] for t in parts]
        else:
            parts = {
                k: found
                for k in range(len(self.datasets))
                if (found := [key for key in keys if key[0] == k])
            }
            weights = [
                self.datasets[k].weight
                or self.datasets[k].repeat * sum(len(self.groups[key]) for key in found)
                for k, found in parts.items()
            ]
        records = [torch.cat([self.groups[key] for key in found]) for found in parts.values()]
        epochs = [[self.datasets[k].epochs for k, _ in found] for found in parts.values()]
        return Picked(
            self, Order(records, weights, [max(e) if min(e) else 0 for e in epochs], seed)
        )


class Picked(Drawn):
    """The stream of a folder: sample n is the record that the order has there; bad ones are passed over by `next`."""

    def __init__(self, folder: Folder, order: Order):
        super().__init__(None, folder.faults)
        self.folder, self.order, self.endless = folder, order, order.endless

    def __getitem__(self, n: int) -> Sample | BadSample | None:
        found = self.order[n]
        return None if found is None else self.folder[found[1]]


def read(path: Path, a: int, b: int, number: int, d: Dataset) -> Sample | BadSample:
    origin = f"{path.name}:{number}"
    try:
        return to_sample(fields_of(path, a, b), origin, d.root(path), d)
    except BadSample as e:
        return e
    except (OSError, *WRONG) as e:
        return BadSample("malformed record", f"{origin}: {type(e).__name__} {e}"[:300])
