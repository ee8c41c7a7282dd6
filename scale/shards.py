"""Weights and training state of a sharded model, to disk and back, also into any other layout.

What it teaches: what a rank holds of a tensor is a *box* of the whole: where it begins, and its shape.
So is what a file holds of it: a released file stores expert 3's gate as a box of the stacked experts, and
another run's rank 5 stored a few rows of a momentum. To load is to copy overlaps of boxes, whatever cut
them: any number of ranks, shards, copies, experts or stages, one process as well.

    a parameter of 6 rows       rank 0 of 2   rows 0-2     part of rank 0 of 3   rows 0-1
                                rank 1        rows 3-5     part of rank 1        rows 2-3   <- both read
                                                           part of rank 2        rows 4-5      of this one

    weights   in the released layout: every rank puts some tensors together, one at a time, and writes
              the file that they are in; nobody holds the model. Every rank reads the rows that it keeps
    state     of optimizers and AdaLRS: every rank writes what it holds, beside it where that lies; of
              several that hold the same the first one writes. Names are those of the parameters, which
              mean the same in every layout; optimizers and AdaLRS number theirs

Why not torch.distributed.checkpoint: its own metadata is a pickle, which runs what is in it; its writer
of safetensors takes no whole numbers and writes files that only it can put together; and neither knows a
sum over a file, without which nobody sees a flipped bit. What is left without it is this page.

Simplified: copies to host memory are made one after the other, from memory that is not pinned; a tensor
that is put together is, for a moment, on all ranks that share it.
"""

import json
import re
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Iterator, Mapping

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate

# The one function of torch behind which the arithmetic of uneven and nested shards stands
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from infra import weights
from scale import parallel
from scale.parallel import Ranks

BOXES = "boxes"  # in a file's metadata: name -> [shape of the whole, where this begins in it]
AT_ONCE = 1 << 30  # bytes read until files are opened anew: what is mapped counts as memory in use
FILE_BYTES = 5 << 30  # of a file of weights, at most

# Keys of what belongs to a parameter, by number (0.5, 7) or by name:
# optimizer.0.5.exp_avg, adalrs.older.o.0.5.exp_avg, and a snapshot of the parameter itself, adalrs.older.t.7
OF_A_PARAMETER = re.compile(r"(optimizer\.|adalrs\.\w+\.o\.)(.+)\.(\w+)|(adalrs\.\w+\.t\.)(.+)")
TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


# ------------------------------------------------------------------------------------------ boxes


@dataclass(frozen=True)
class Box:
    """A part of a whole tensor: its first index in every dimension, and its shape."""

    begin: tuple[int, ...]
    shape: tuple[int, ...]

    def overlap(self, other: "Box") -> "Box | None":
        """What both cover; None if nothing."""
        begin = []
        shape = []
        for a, n, b, m in zip(self.begin, self.shape, other.begin, other.shape, strict=True):
            begin.append(max(a, b))
            shape.append(min(a + n, b + m) - begin[-1])
        if any(length <= 0 for length in shape):
            return None
        return Box(tuple(begin), tuple(shape))

    def inside(self, outer: "Box") -> tuple[slice, ...]:
        """Where this box is in the tensor that holds `outer`."""
        starts = [b - o for b, o in zip(self.begin, outer.begin)]
        return tuple(slice(start, start + n) for start, n in zip(starts, self.shape))


def held_box(tensor: Tensor) -> Box:
    """What this rank holds of a tensor."""
    if not isinstance(tensor, DTensor):
        return Box((0,) * tensor.ndim, tuple(tensor.shape))
    shape, begin = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return Box(tuple(begin), tuple(shape))


def on_host(tensor: Tensor) -> Tensor:
    """A copy in host memory that nothing else shares."""
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)


def boxes_on_disk(name: str, shape: torch.Size, layout: weights.Layout) -> dict[str, Box]:
    """Names under which a parameter is stored -> the box of it that each is, from the layout's views."""
    whole = torch.empty(shape, device="meta")
    boxes = {}
    for stored, view in layout(name, whole).items():
        begin = []
        rest = view.storage_offset()
        for stride in whole.stride():
            begin.append(rest // max(stride, 1))
            rest %= max(stride, 1)
        missing = len(shape) - view.ndim  # leading dimensions that the layout took one index of
        boxes[stored] = Box(tuple(begin), (1,) * missing + tuple(view.shape))
    return boxes


# ---------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Piece:
    """A tensor in a file, and the box that it is of a whole one."""

    path: Path
    name: str
    box: Box


class Files:
    """Safetensors files, each opened once. To be used in a `with`."""

    def __init__(self):
        self.opened: dict[Path, safe_open] = {}
        self.stack = ExitStack()
        self.read_bytes = 0

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        self.stack.close()
        self.opened.clear()

    def file(self, path: Path) -> safe_open:
        if path not in self.opened:
            self.opened[path] = self.stack.enter_context(safe_open(path, "pt"))
        return self.opened[path]

    def check(self, piece: Piece) -> None:
        """Raises ValueError for a tensor of another shape than its box, or that is not floating."""
        stored = self.file(piece.path).get_slice(piece.name)
        shape = tuple(stored.get_shape())
        if shape != piece.box.shape[len(piece.box.shape) - len(shape) :]:
            raise ValueError(
                f"{piece.path}: {piece.name} has shape {list(shape)}, the model wants "
                f"{list(piece.box.shape)}"
            )
        if stored.get_dtype() not in weights.FLOATING:
            raise ValueError(
                f"{piece.path}: {piece.name} has type {stored.get_dtype()}, a floating type is wanted"
            )

    def read(self, piece: Piece, wanted: Box) -> Tensor:
        """The values of a box that lies in a piece's, in the shape of the box."""
        stored = self.file(piece.path).get_slice(piece.name)
        dims = len(stored.get_shape())
        if dims:
            # leading dimensions, of which the file holds one index, are not in it
            values = stored[wanted.inside(piece.box)[len(wanted.shape) - dims :]]
        else:
            values = self.file(piece.path).get_tensor(piece.name)

        before = self.read_bytes
        self.read_bytes += values.nbytes
        if before // AT_ONCE != self.read_bytes // AT_ONCE:
            self.close()
        return values.view(wanted.shape)


@torch.no_grad()
def fill_from(target: Tensor, pieces: list[Piece], files: Files) -> None:
    """Copy all that pieces have of what this rank holds of a tensor.

    Raises ValueError where they do not make it whole.
    """
    own = held_box(target)
    values = parallel.local(target.detach())
    filled = 0
    for piece in pieces:
        both = own.overlap(piece.box)
        if both is not None:
            part = files.read(piece, both)
            values[both.inside(own)].copy_(part)
            filled += part.numel()
    if filled != values.numel():
        names = pieces[0].name if pieces else "a tensor"
        raise ValueError(
            f"{names}: its files hold {filled} of the {values.numel()} values of this rank"
        )


# ----------------------------------------------------------------------------------- weights: read


def materialise(
    model: nn.Module,
    directory,
    dtype: torch.dtype = torch.float32,
    device="cpu",
    layout: weights.Layout = weights.published,
) -> int:
    """Memory and values for a model that was built on the meta device and sharded there.

    No rank ever holds more than its shards and one piece. Returns bytes read by this rank. All ranks
    together; raises ValueError as `read_weights` does.
    """
    # of a pipeline's rank, section by section: what is sharded together is theirs
    for part in [*getattr(model, "sections", {}).values()] or [model]:
        part.to(dtype).to_empty(device=device)
    return read_weights(model, directory, layout)


def read_weights(model: nn.Module, directory, layout: weights.Layout = weights.published) -> int:
    """Overwrite a model's parameters, sharded or not, with a released directory's (or a checkpoint's).

    All ranks together, each reads what it holds. Returns the bytes that this rank read. Raises
    ValueError on all of them, naming the first tensor that is missing, unused, of a wrong shape or type,
    or not finite.
    """
    # Where this rank's parameters are, and the names that all stages of a pipeline want
    directory = Path(directory)
    reshard(model)
    boxes = {n: boxes_on_disk(n, p.shape, layout) for n, p in model.named_parameters()}
    first, _ = parallel.place()
    own = [stored for part in boxes.values() for stored in part] if first == 0 else []
    wanted = dict.fromkeys(parallel.gather(own, everyone=True))

    # Names of the whole directory, then values; what is wrong on one rank is wrong for all
    problem = ""
    files = Files()
    try:
        stored = weights.locate(directory)
        if weights.is_tied(model):  # one tensor, which may be stored under both of its names
            stored = {n: path for n, path in stored.items() if not n.endswith(weights.HEAD)}
        weights.check_names(stored, wanted, directory)
        with files:
            for name, p in model.named_parameters():
                pieces = [Piece(stored[n], n, box) for n, box in boxes[name].items()]
                read_parameter(p, pieces, files)
    except (ValueError, OSError) as error:
        problem = str(error)
    refuse_together(problem)
    return files.read_bytes


def read_parameter(p: Tensor, pieces: list[Piece], files: Files) -> None:
    """What this rank holds of a parameter. Raises ValueError naming a tensor that does not fit."""
    for piece in pieces:
        files.check(piece)
    fill_from(p, pieces, files)
    if not weights.is_finite(parallel.local(p.detach())):
        raise ValueError(
            f"{pieces[0].path}: {pieces[0].name} holds values that are not finite numbers in {p.dtype}; "
            "the run that wrote it went wrong, take an earlier checkpoint"
        )


def refuse_together(problem: str) -> None:
    """Raises ValueError on all ranks with the first rank's problem, if any has one ("": none)."""
    problems = [text for text in parallel.gather([problem], True) if text]
    if problems:
        raise ValueError(problems[0])


def reshard(model: nn.Module) -> None:
    """Parameters are the shards again, also after a forward pass that no backward pass followed."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


# ---------------------------------------------------------------------------------- weights: write


@dataclass(frozen=True)
class Writers:
    """The ranks that write: rank 0 alone where every rank holds everything, else all of them.

    rank of size: among all. row of rows: among those that hold parts of the same (a pipeline's stage).
    """

    rank: int = 0
    size: int = 1
    row: int = 0
    rows: int = 1

    @staticmethod
    def among(ranks: Ranks) -> "Writers":
        if ranks.mesh is None:
            return Writers(rank=parallel.place_of_all()[0])
        return Writers(*parallel.place_of_all(), ranks.rank, ranks.size)

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def writes(self) -> bool:
        return self.rank < self.size

    def gather(self, values: list) -> list:
        """As `parallel.gather` of all that write; a writer that is alone asks nobody."""
        return parallel.gather(values, True) if self.size > 1 else values


def owners(model: nn.Module, rows: int) -> dict[str, int]:
    """Parameter -> the rank, of those that share it, that writes it: runs of about equal bytes."""
    sizes = {name: p.numel() * p.element_size() for name, p in model.named_parameters()}
    ends = list(accumulate(sizes.values()))

    # by where the middle of a parameter lies on the line of all bytes
    owner_of = {}
    for (name, size), end in zip(sizes.items(), ends):
        middle = end - size / 2
        owner_of[name] = min(rows - 1, int(rows * middle / ends[-1]))
    return owner_of


@dataclass(frozen=True)
class PlannedFile:
    """A file of weights: the rank (among all) that writes it, the tensors in it, their bytes."""

    rank: int
    names: list[str]
    nbytes: int


def plan_files(
    model: nn.Module,
    writers: Writers,
    file_bytes: int = FILE_BYTES,
    layout: weights.Layout = weights.published,
) -> dict[str, PlannedFile]:
    """Name -> all files of a model's weights, whoever writes them. All writers together."""
    # The tensors that this rank writes, as shapes
    own = {}
    owner_of = owners(model, writers.rows)
    for name, p in model.named_parameters():
        if owner_of[name] == writers.row:
            own |= layout(name, torch.empty(p.shape, dtype=p.dtype, device="meta"))

    # Its files, and everybody's
    mine = []
    if own:
        for names in weights.split_into_shards(own, file_bytes).values():
            nbytes = sum(own[name].nbytes for name in names)
            mine.append(PlannedFile(writers.rank, names, nbytes))
    everyone = writers.gather(mine)
    return dict(zip(weights.file_names(len(everyone)), everyone))


def index_of_plan(plan: dict[str, PlannedFile]) -> dict:
    """The index of several files."""
    shards = {file: planned.names for file, planned in plan.items()}
    return weights.index_of(shards, sum(planned.nbytes for planned in plan.values()))


@torch.no_grad()
def own_weights(
    model: nn.Module, writers: Writers, layout: weights.Layout = weights.published
) -> dict[str, Tensor]:
    """Copies, in host memory, of the stored tensors that this rank writes.

    All writers together: each tensor is put together in turn, and kept by its owner.
    """
    reshard(model)
    owner_of = owners(model, writers.rows)
    copies = {}
    for name, p in model.named_parameters():
        whole = parallel.whole(p.detach())
        if owner_of[name] == writers.row:
            copies |= {stored: on_host(view) for stored, view in layout(name, whole).items()}
        # before the next one is there
        del whole
    return copies


def save_released(model: nn.Module, directory, ranks: Ranks, file_bytes: int = FILE_BYTES) -> None:
    """What `save_pretrained` writes of a model that one process holds, cut into more files.

    All ranks together, each writes some files; all is there when it returns. Raises ValueError on all of
    them when one cannot write.
    """
    # Copies, and each rank's own files
    writers = Writers.among(ranks)
    directory = Path(directory)
    problem = ""
    if writers.writes:
        plan = plan_files(model, writers, file_bytes)
        copies = own_weights(model, writers)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            for file, planned in plan.items():
                if planned.rank == writers.rank:
                    part = {name: copies.pop(name) for name in planned.names}
                    weights.replace_file(part, directory / file)
        except (OSError, SafetensorError) as error:
            problem = f"rank {writers.rank}: {error}"
    refuse_together(problem)

    # A model only now that all files are there
    if writers.main:
        shards = {file: planned.names for file, planned in plan.items()}
        total = sum(planned.nbytes for planned in plan.values())
        weights.write_index(directory, model.config.to_dict(), shards, total)
    parallel.total(0.0, everyone=True)


# ----------------------------------------------------------------------------------- state: names


class Names:
    """What optimizers and AdaLRS number, by the names of parameters: a pipeline's stages count apart.

    searched: AdaLRS's tensors. whole: all parameters are here, as they are not in a pipeline.
    """

    def __init__(
        self, model: nn.Module, optimizers: list, searched: list[Tensor], whole: bool = True
    ):
        self.whole = whole
        self.parameters = dict(model.named_parameters())
        name_of = {id(p): name for name, p in self.parameters.items()}

        # Of optimizers "0.5" is the parameter 5 of the first one
        self.groups: list[list[list[str]]] = []
        self.name_of: dict[str, str] = {}
        for at, optimizer in enumerate(optimizers):
            groups = [[name_of[id(p)] for p in g["params"]] for g in optimizer.param_groups]
            self.groups.append(groups)
            names = [name for group in groups for name in group]
            self.name_of |= {f"{at}.{i}": name for i, name in enumerate(names)}
        self.number_of = {name: number for number, name in self.name_of.items()}

        self.searched = {str(i): name_of[id(t)] for i, t in enumerate(searched)}
        self.place_of = {name: place for place, name in self.searched.items()}

    def named(self, key: str) -> str:
        """optimizer.0.5.exp_avg -> optimizer.NAME.exp_avg; a key of nobody's stays as it is."""
        match = OF_A_PARAMETER.fullmatch(key)
        if not match:
            return key
        before, number, of_it, snapshot, place = match.groups()
        if snapshot:
            return snapshot + self.searched[place]
        return f"{before}{self.name_of[number]}.{of_it}"

    def numbered(self, key: str) -> tuple[str, Tensor] | None:
        """The inverse, and the parameter; None where it is another stage's. Numbers are taken, too."""
        before, name, of_it, snapshot, searched = OF_A_PARAMETER.fullmatch(key).groups()
        if snapshot:
            place = searched if searched in self.searched else self.place_of.get(searched)
            if place is None:
                return None
            return snapshot + place, self.parameters[self.searched[place]]
        number = name if name in self.name_of else self.number_of.get(name)
        if number is None:
            return None
        return f"{before}{number}.{of_it}", self.parameters[self.name_of[number]]

    def named_rest(self, rest: list[dict]) -> list[dict]:
        """What `adalrs.optimizer_state` returns beside tensors: one entry a group, with its names."""
        entries = []
        for groups, saved in zip(self.groups, rest, strict=True):
            names = [name for group in groups for name in group]
            numbers = {}
            for key, value in saved["numbers"].items():
                i, of_it = key.split(".", 1)
                numbers[names[int(i)], of_it] = value
            for group, options in zip(groups, saved["options"], strict=True):
                own = {f"{n}.{of_it}": v for (n, of_it), v in numbers.items() if n in set(group)}
                entries.append({"names": group, "options": options, "numbers": own})
        return entries

    def numbered_rest(self, entries: list[dict]) -> list[dict]:
        """The inverse, for the groups that there are here. Raises ValueError for one that has no entry."""
        if entries and "names" not in entries[0]:
            return entries
        entry_of = {name: entry for entry in entries for name in entry["names"]}
        rest = []
        for groups in self.groups:
            for name in (name for group in groups for name in group):
                if name not in entry_of:
                    raise ValueError(f"the checkpoint has no optimizer state for {name}")
            options = [entry_of[group[0]]["options"] for group in groups]

            numbers = {}
            names = [name for group in groups for name in group]
            for entry in entries:
                for key, value in entry["numbers"].items():
                    name, _, of_it = key.rpartition(".")
                    if name in names:
                        numbers[f"{names.index(name)}.{of_it}"] = value
            rest.append({"numbers": numbers, "options": options})
        return rest


# -------------------------------------------------------------------------- state: write and read


def is_first(tensor: Tensor, writers: Writers) -> bool:
    """Whether this rank is the first of those that hold the same values of a tensor."""
    if not isinstance(tensor, DTensor):
        return writers.row == 0
    place = tensor.device_mesh.get_coordinate()
    return all(at == 0 for at, p in zip(place, tensor.placements) if isinstance(p, Replicate))


def own_state(tensors: dict[str, Tensor], writers: Writers) -> tuple[dict[str, Tensor], dict]:
    """(copies in host memory of what this rank writes, metadata that says where each lies)."""
    copies = {}
    boxes = {}
    for name, tensor in tensors.items():
        box = held_box(tensor)
        whole = box.shape == tuple(tensor.shape)
        if is_first(tensor, writers) and (whole or parallel.local(tensor).numel()):
            copies[name] = on_host(parallel.local(tensor.detach()))
            if not whole:
                boxes[name] = [list(tensor.shape), list(box.begin)]
    return copies, {BOXES: json.dumps(boxes)} if boxes else {}


class SavedState(Files):
    """The tensors in a checkpoint's state files, whoever wrote which part."""

    def __init__(self, paths: list[Path]):
        super().__init__()
        self.pieces: dict[str, list[Piece]] = defaultdict(list)
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in paths:
            boxes = json.loads((self.file(path).metadata() or {}).get(BOXES, "{}"))
            for name in self.file(path).keys():
                shape = tuple(self.file(path).get_slice(name).get_shape())
                whole, begin = boxes.get(name, (shape, (0,) * len(shape)))
                self.pieces[name].append(Piece(path, name, Box(tuple(begin), shape)))
                self.shapes[name] = tuple(whole)

    def tensor(self, name: str, like: Tensor | None = None) -> Tensor:
        """One of them, laid out as `like` is where it has that shape, else whole, in host memory.

        Raises ValueError where parts of it are missing.
        """
        pieces = self.pieces[name]
        dtype = TYPES[self.file(pieces[0].path).get_slice(name).get_dtype()]
        if like is not None and tuple(like.shape) == self.shapes[name]:
            tensor = torch.empty_like(like.detach(), dtype=dtype)
        else:
            tensor = torch.empty(self.shapes[name], dtype=dtype)
        fill_from(tensor, pieces, self)
        return tensor


class Part(Mapping):
    """Those tensors of a saved state whose names begin alike, by number, read when they are asked for.

    So an optimizer's state is taken over one tensor at a time. Raises ValueError for one of a parameter
    that is nowhere.
    """

    def __init__(self, state: SavedState, names: Names, prefix: str):
        self.state = state
        self.prefix = prefix
        self.source: dict[str, tuple[str, Tensor]] = {}  # number -> name on disk, parameter
        for name in state.pieces:
            found = names.numbered(name) if name.startswith(prefix) else None
            if found is None and name.startswith(prefix) and names.whole:
                raise ValueError(f"{name} is of no parameter that is trained here")
            if found:
                number, parameter = found
                self.source[number.removeprefix(prefix)] = (name, parameter)

    def __getitem__(self, key: str) -> Tensor:
        return self.state.tensor(*self.source[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self.source)

    def __len__(self) -> int:
        return len(self.source)
