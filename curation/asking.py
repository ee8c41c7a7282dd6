"""Asking a model many questions, several times each: over ranks, in bounded batches, resumable.

What it teaches: measuring a model on a million questions is a loop that will be interrupted. If the
work is cut into numbered batches whose answers depend on nothing but the number, then any rank may
do any batch, an interrupted command continues with the batches that are missing, and the result is
that of a run that was never stopped.

    samples[i] -> batch i // size -> rank batch % ranks -> prompts -> parts that fit the cache
      -> generate, `tries` each -> graded -> one line for each question in ANSWERS/rank.jsonl
    all lines -> `records()` -> what a command makes of them (pass rates, chains)

Questions are asked with the request to think, as RL asks them. A question that cannot be asked (no
truth, a picture that cannot be read) gets a line as well: its fault, counted at the end.

Memory: the cache of keys and values is what grows with the number of answers. `--cache-gib` bounds
it: a batch is generated in parts, each of as many questions as fit.

Simplified: the ranks share a file system, as they do for their checkpoints.
"""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence

import torch
import tyro
from tqdm import tqdm

from data.encode import Encoder, known_grader, truth_of, with_thinking
from data.readers import Folder
from data.sample import BadSample, Faults, Sample
from generate import generate, load_model
from graders import JUDGED, accepted_truths
from infra.device import Precision, pick_device, torch_type
from infra.system import lock_file
from rewards import answer_reward, format_reward
from scale import parallel
from tokenizer import Tokenizer
from vlm import SailVL

# What a record of unforeseen form raises when it is made a question.
UNUSABLE = (ValueError, LookupError, TypeError, AttributeError)


@dataclass(frozen=True)
class Sampling:
    """How a question is asked. All of it decides the answers, so all of it is part of a file of answers."""

    tries: int = 4
    max_new: int = 64  # tokens of an answer
    temperature: float = 1.0
    seed: int = 0
    batch: int = 64  # questions that are asked together
    cache_gib: float = 4.0  # memory for keys and values
    max_length: int = 16384  # tokens of a question, its pictures included

    def __post_init__(self):
        if min(self.tries, self.max_new, self.batch) < 1 or self.cache_gib <= 0:
            raise ValueError("--tries, --max-new, --batch and --cache-gib must be positive")
        if self.temperature <= 0 and self.tries > 1:
            raise ValueError("--temperature 0 says the same every time: give --tries 1 with it")


@dataclass(frozen=True)
class Reply:
    """One answer: its text, whether the model ended it, what the rules say of its box and its form."""

    text: str
    finished: bool
    answer: float  # reward of the answer in the box, in [0, 1]
    form: float  # 1 for a chain and one box after it

    @property
    def right(self) -> bool:
        """Wholly right: partial credit (an overlap, an edit distance) is not."""
        return self.answer >= 1


@dataclass(frozen=True)
class Record:
    """What became of question `index`: its replies, or why it could not be asked (reason, detail)."""

    index: int
    origin: str
    replies: tuple[Reply, ...] = ()
    fault: tuple[str, str] | None = None

    @property
    def pass_rate(self) -> float:
        """The share of the replies that are right."""
        return sum(reply.right for reply in self.replies) / len(self.replies)


# ---------------------------------------------------------------------------------------- answers


class Remembered:
    """Answers that are kept in memory, for a caller that goes on with them at once."""

    def __init__(self):
        self.mine: list[Record] = []

    def known(self) -> set[int]:
        return set()

    def add(self, records: list[Record]) -> None:
        self.mine += records

    def records(self) -> Iterator[Record]:
        """All ranks' records, in the order of the questions, on every rank."""
        everything = parallel.gather(self.mine)
        return iter(sorted(everything, key=lambda record: record.index))


class AnswerFiles:
    """Answers on disk: a folder with settings.json and a file for each rank.

    A batch is appended in one write, after it is done; a line that a kill cut short is dropped.
    to_line, from_line: how a record of another kind than `Record` is written; it needs an `index`.
    option: what a message tells a user to change.
    Raises ValueError when the folder holds answers of another model, other data or other options,
    and when another process writes there.
    """

    def __init__(
        self,
        folder: Path,
        settings: dict,
        to_line: Callable[[Any], dict] | None = None,
        from_line: Callable[[dict], Any] | None = None,
        option: str = "--answers",
    ):
        self.folder = Path(folder)
        self.option = option
        self.to_line = to_line or as_line
        self.from_line = from_line or record_of
        self.rank, _ = parallel.place()
        self.folder.mkdir(parents=True, exist_ok=True)
        # One writer for each file: two would ask everything twice.
        self.file = open(self.folder / f"{self.rank}.jsonl", "a+b")
        if not lock_file(self.file):
            raise ValueError(
                f"{self.folder}: another process is writing here; wait for it, or give another {option}"
            )
        self.compare(settings)
        self.mend()

    def compare(self, settings: dict) -> None:
        """Answers that were given to something else are not taken for answers to this."""
        settings = json.loads(json.dumps(settings, default=str))
        path = self.folder / "settings.json"
        answered = any(file.stat().st_size for file in self.folder.glob("*.jsonl"))
        if self.rank == 0 and not (answered and path.exists()):
            temporary = path.with_suffix(".part")
            temporary.write_text(json.dumps(settings, indent=1) + "\n")
            temporary.rename(path)
        parallel.gather([])  # the others read what rank 0 has written

        # The first difference is enough to say.
        saved = json.loads(path.read_text())
        for key in sorted(saved.keys() | settings.keys()):
            if saved.get(key) != settings.get(key):
                raise ValueError(
                    f"{self.folder} holds answers with {key} {saved.get(key)!r}, now it is "
                    f"{settings.get(key)!r}: give another {self.option}, or remove that folder"
                )

    def close(self) -> None:
        """Another may write from now on."""
        self.file.close()

    def mend(self) -> None:
        """Drop the line that a kill left unfinished."""
        self.file.seek(0)
        content = self.file.read()
        whole = content.rfind(b"\n") + 1
        self.file.truncate(whole)

    def known(self) -> set[int]:
        """The questions that have a record, by any rank of this run or an earlier one."""
        return {record.index for record in self.stored()}

    def add(self, records: list[Record]) -> None:
        # In one write, so that a kill leaves a whole batch or a torn end.
        lines = [json.dumps(self.to_line(record)) + "\n" for record in records]
        self.file.write("".join(lines).encode())
        self.file.flush()

    def records(self) -> Iterator[Record]:
        """All records in the order of the questions. Of a question that was asked twice, the last one."""
        latest = {record.index: record for record in self.stored()}
        return (latest[index] for index in sorted(latest))

    def stored(self) -> Iterator[Record]:
        for path in sorted(self.folder.glob("*.jsonl")):
            with open(path, "rb") as file:
                for line in file:
                    if line.endswith(b"\n"):
                        yield self.from_line(json.loads(line))


def as_line(record: Record) -> dict:
    """A record as JSON, for people to read as well."""
    line = {"index": record.index, "origin": record.origin}
    if record.fault:
        line["fault"] = list(record.fault)
    else:
        line["replies"] = [asdict(reply) for reply in record.replies]
    return line


def record_of(line: dict) -> Record:
    """The inverse of `as_line`."""
    replies = tuple(Reply(**reply) for reply in line.get("replies", ()))
    fault = tuple(line["fault"]) if "fault" in line else None
    return Record(line["index"], line["origin"], replies, fault)


# ----------------------------------------------------------------------------------------- asking


def ask_all(
    model: SailVL,
    encoder: Encoder,
    samples: Sequence[Sample | BadSample],
    sampling: Sampling,
    answers: Remembered | AnswerFiles,
    progress: bool = False,
) -> None:
    """Ask every question that has no answer yet; each rank does its share of the batches."""
    rank, size = parallel.place()

    # The batches that are missing, the same on all ranks.
    known = set(parallel.gather(sorted(answers.known()))) if size > 1 else answers.known()
    batches = []
    for first in range(0, len(samples), sampling.batch):
        indices = range(first, min(first + sampling.batch, len(samples)))
        if not known.issuperset(indices):
            batches.append(indices)

    # This rank's.
    was_training = model.training
    model.eval()
    mine = batches[rank::size]
    for indices in tqdm(mine, desc="asking", unit="batch", disable=not progress or rank > 0):
        answers.add(answer_batch(model, encoder, samples, indices, sampling))
    model.train(was_training)

    # Nobody goes on before all have answered.
    parallel.gather([])


def answer_batch(
    model: SailVL,
    encoder: Encoder,
    samples: Sequence[Sample | BadSample],
    indices: Sequence[int],
    sampling: Sampling,
) -> list[Record]:
    """One record for each of the batch's questions. Depends on the batch alone."""
    records: dict[int, Record] = {}

    # What can be asked.
    prompts: list[Prompt] = []
    for index in indices:
        sample = samples[index]
        try:
            prompts.append(prompt_of(index, sample, encoder, sampling.max_length))
        except BadSample as fault:
            origin = getattr(sample, "origin", "")
            records[index] = Record(index, origin, fault=(fault.reason, fault.args[1]))

    # In parts that fit into memory, each with random numbers of its own.
    for number, part in enumerate(parts_of(prompts, model, sampling)):
        seed = sampling.seed + 7919 * (1 + indices[0]) + number
        for record in answer_part(model, encoder.tokenizer, part, sampling, seed):
            records[record.index] = record
    return [records[index] for index in indices]


@dataclass(frozen=True)
class Prompt:
    """A question as the model takes it, with what its answers are graded by."""

    index: int
    origin: str
    encoded: tuple = field(repr=False)  # ids and images, as from Encoder.prompt
    truths: tuple[str, ...] = ()
    grader: str = "auto"


def prompt_of(index: int, sample: Sample | BadSample, encoder: Encoder, max_length: int) -> Prompt:
    """Raises BadSample when the sample is no question, has no truth, or is too long."""
    # What its answers can be graded by.
    if isinstance(sample, BadSample):
        raise sample
    truths = tuple(accepted_truths(truth_of(sample)))
    grader = known_grader(sample)
    if grader == JUDGED:
        raise BadSample("wants a judge", f"{sample.origin}: only rl.py has one")

    # The question with its pictures.
    known = replace(sample, facts=sample.facts | {"answer": truths[0]})
    try:
        encoded = encoder.prompt(with_thinking(known, encoder.tokenizer.think_prompt))
    except BadSample:
        raise
    except UNUSABLE as error:
        detail = f"{sample.origin}: {type(error).__name__} {error}"
        raise BadSample("cannot be asked", detail[:300]) from error

    tokens = len(encoded[0])
    if tokens > max_length:
        raise BadSample("too long", f"{sample.origin}: {tokens} tokens, the limit is {max_length}")
    return Prompt(index, sample.origin, encoded, truths, grader)


def parts_of(prompts: list[Prompt], model: SailVL, sampling: Sampling) -> list[list[Prompt]]:
    """Neighbours whose answers' keys and values fit into the cache together; at least one question a part."""
    # What a token costs, and what there is.
    text = model.config.text
    width = text.num_key_value_heads * text.head_dim
    element = model.language_model.lm_head.weight.element_size()
    token = 2 * text.num_hidden_layers * width * element  # bytes of keys and values
    limit = sampling.cache_gib * 2**30

    # Prompts are padded to the longest of their part.
    parts: list[list[Prompt]] = []
    longest = 0
    for prompt in prompts:
        length = len(prompt.encoded[0])
        longest = max(longest, length)

        # While prompts are repeated for their tries, the cache is there once more for each prompt.
        rows = (len(parts[-1]) + 1 if parts else 1) * (sampling.tries + 1)
        fits = rows * (longest + sampling.max_new) * token <= limit
        if parts and fits:
            parts[-1].append(prompt)
        else:
            parts.append([prompt])
            longest = length
    return parts


def answer_part(
    model: SailVL, tokenizer: Tokenizer, part: list[Prompt], sampling: Sampling, seed: int
) -> list[Record]:
    """Generated together, graded one by one."""
    generated = generate(
        model,
        [prompt.encoded for prompt in part],
        tokenizer.ends,
        sampling.max_new,
        sampling.tries,
        sampling.temperature,
        seed=seed,
    )

    # Without the end token, which is no part of what was said.
    replies: list[list[Reply]] = [[] for _ in part]
    for answer in generated:
        prompt = part[answer.prompt]
        ids = answer.ids[:-1] if answer.finished else answer.ids
        text = tokenizer.decode(ids)
        earned = answer_reward(text, list(prompt.truths), answer.finished, prompt.grader)
        form = format_reward(text, answer.finished)
        replies[answer.prompt].append(Reply(text, answer.finished, earned, form))
    return [Record(prompt.index, prompt.origin, tuple(said)) for prompt, said in zip(part, replies)]


# --------------------------------------------------------------------------------------- commands


@dataclass
class AskOptions:
    """What every command that asks a model wants to know."""

    model: Path
    data: Path  # JSON, JSONL, TSV, tar, parquet, a folder of them, or a mixture file
    out: Path  # JSONL, in our own format
    images: Path | None = None  # folder of the images; default: beside the data
    answers: Path | None = None  # folder of the answers, to go on from; default: OUT.answers
    limit: int = 0  # records of the data; 0: all
    sampling: tyro.conf.OmitArgPrefixes[Sampling] = field(
        default_factory=lambda: Sampling(max_new=2048)
    )
    device: str = ""  # cuda, npu, mps, cpu; default: the accelerator, if there is one
    dtype: Precision = "float32"


class Records(Sequence):
    """The records of a folder, each read from disk when it is asked for."""

    def __init__(self, folder: Folder, limit: int = 0):
        self.folder = folder
        self.limit = limit

    @property
    def versions(self) -> list:
        """What tells the files that they come from from others in their place."""
        return self.folder.versions

    @property
    def refused(self) -> dict[str, int]:
        """What the first look found to be no record, by reason."""
        return self.folder.faults.counts

    def __len__(self) -> int:
        return min(self.limit or len(self.folder), len(self.folder))

    def __getitem__(self, index: int) -> Sample | BadSample:
        if index >= len(self):
            raise IndexError(index)
        return self.folder[index]


def settings_of(options: AskOptions, records: Records) -> dict:
    """What the answers depend on: model, data and sampling, with sizes and times of the files."""
    # A model that was trained on, or data that grew, has another size or time.
    model_files = sorted(options.model.rglob("*.safetensors"))
    data_files = [path for path, _ in records.folder.files]
    stamps = {}
    for name, files in (("model files", model_files), ("data files", data_files)):
        found = [path.stat() for path in files]
        stamps[name] = [[stat.st_size, stat.st_mtime_ns] for stat in found]
    return {
        "model": str(options.model.resolve()),
        "data": str(options.data.resolve()),
        "images": str(options.images),
        "records": len(records),
        "dtype": options.dtype,
        **stamps,
        **asdict(options.sampling),
    }


def ask_about_files(options: AskOptions) -> tuple[Records, AnswerFiles, parallel.Ranks]:
    """From files to files of answers. On return all questions are answered, on all ranks."""
    # What can be wrong is found before the first question is asked.
    if options.out.suffix != ".jsonl":
        raise ValueError(f"--out {options.out}: a JSONL file is written, call it .jsonl")
    ranks = parallel.start()
    device = pick_device(options.device, ranks.device)
    records = Records(Folder(options.data, options.images), options.limit)
    model, tokenizer = load_model(options.model, device, torch_type(options.dtype))

    # Asked without gradients, in a folder that the next call goes on from.
    answers_folder = options.answers or options.out.with_suffix(".answers")
    answers = AnswerFiles(answers_folder, settings_of(options, records))
    encoder = Encoder(tokenizer, model.config, records.folder.root)
    with torch.inference_mode():
        ask_all(model, encoder, records, options.sampling, answers, progress=True)
    return records, answers, ranks


@dataclass
class Funnel:
    """How many questions came through each step, and why the others did not."""

    steps: dict[str, int] = field(default_factory=dict)
    faults: Faults = field(default_factory=Faults)

    def count(self, step: str, number: int = 1) -> None:
        self.steps[step] = self.steps.get(step, 0) + number

    def asked(self, records: Iterator[Record]) -> Iterator[Record]:
        """Passes on what was asked, and counts."""
        for record in records:
            if record.fault:
                self.faults.add(BadSample(*record.fault))
                continue
            self.count("asked")
            self.count("solved at least once", int(record.pass_rate > 0))
            yield record

    def report(self) -> str:
        # A line for each step, then the faults.
        widest = max(map(len, self.steps))
        lines = [f"{step:{widest}s} {number:9d}" for step, number in self.steps.items()]
        return "\n".join(lines + [self.faults.report()]).rstrip()


def open_funnel(records: Records) -> Funnel:
    """Begins with what the reader saw; records that it refused at once are no part of `records`."""
    funnel = Funnel(faults=records.folder.faults)
    refused = sum(records.folder.faults.counts.values())
    funnel.count("read", len(records) + refused)
    funnel.count("readable", len(records))
    return funnel


def sample_of(record: Record, records: Records) -> Sample:
    """The sample that a record is about. Raises BadSample when it is not there any more."""
    # Read again: nothing but numbers was kept while the questions were asked.
    sample = records[record.index]
    if isinstance(sample, BadSample):
        raise sample
    if sample.origin != record.origin:
        raise BadSample("data changed", f"{record.origin} is now {sample.origin}")
    return sample
