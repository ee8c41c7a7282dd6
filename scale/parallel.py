"""Several processes, one model: how they meet, what they tell each other, and how they part.

What it teaches: data parallelism is one sum. Every rank holds the same weights and its share of the
global batch; after the backward pass the gradients are summed. Losses are already divided by the
*global* weight, so a sum is exact however the tokens fall. With one process nothing is initialised
and every function returns at once, so the loop need not ask how many there are.

    torchrun --standalone --nproc-per-node 2 pretrain.py multitask

    rank 0   rows 0, 2, ..  ── backward ──┐
                                          ├── sum_gradients ── the same step on both
    rank 1   rows 1, 3, ..  ── backward ──┘
               total, gather: small numbers and Python objects, over gloo, on the CPU

Ranks that differ train without an error and come apart unseen, so `agree` compares them before the
first step. A rank that dies or hangs is named by those that waited for it (`missing_ranks`); when
the launcher dies, its ranks end too (`Watcher`).

What listens: on one node gloo listens on the loopback interface only (GLOO_SOCKET_IFNAME decides
otherwise). The rendezvous of torchrun listens on all interfaces, in torchrun's own process, which
nothing here can change: let a firewall close it.

That is the plain layout. With others (scale/layout.py) the backward pass sums the gradients of sharded
weights (scale/shard.py), and `total` and `gather` are of the ranks that see different rows: those of one
stage of a pipeline, unless `everyone` is wanted. `divide` is the other thing that ranks do for each
other: work that need be done only once.

Simplified: gradients of weights that are not sharded travel in one piece after the backward pass.
"""

import json
import math
import os
import signal
import socket
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from itertools import accumulate
from typing import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from infra.identity import differences
from infra.text import printable
from scale.layout import Layout, Mesh, mesh_of

TIMEOUT = 1800.0  # seconds: longer than one rank takes to write and hash a large checkpoint
ROLL_CALL = 3.0  # seconds in which the ranks that are left report, once a collective has failed
ORPHAN = 45.0  # seconds that a rank has for its last checkpoint once its launcher is gone


@dataclass(frozen=True)
class Ranks:
    """This process among all that see different rows: its rank of `size`, its device, its patience.

    Those of one row, the stages of a pipeline, have the same rank. mesh: None where every rank holds
    the whole model.
    """

    rank: int = 0
    size: int = 1
    device: str = "cpu"
    timeout: float = TIMEOUT  # the most seconds that it waits for others
    layout: Layout = Layout()
    mesh: Mesh | None = None
    stage: int = 0  # of the pipeline

    @property
    def main(self) -> bool:
        """Whether this is the one process that prints and writes what exists once."""
        return self.rank == 0 and self.stage == 0


@dataclass
class Meeting:
    """What `start` leaves for the functions below: where ranks leave notes for each other."""

    store: dist.Store | None = None
    timeout: float = TIMEOUT
    mesh: Mesh | None = None  # None: every rank holds the whole model
    # ranks that see different rows, on the CPU's transport; None: all
    rows: dist.ProcessGroup | None = None
    watcher: "Watcher | None" = None  # of the launcher


_meeting = Meeting()


# ------------------------------------------------------------------------------ begin and end


def start(timeout: float = TIMEOUT, layout: Layout = Layout(), kind: str = "") -> Ranks:
    """Join torchrun's process group if there is one. kind: of device, "" for `device_kind`.

    timeout: seconds that a collective waits for the slowest rank. Raises ConnectionError when not
    all ranks come, ValueError for a layout that does not fit their number, or for more ranks than devices.
    """
    kind = kind or device_kind()
    use_own_processors()
    layout = layout.fitted(int(os.environ.get("WORLD_SIZE", 1)))
    if "WORLD_SIZE" not in os.environ:
        if not layout.plain:
            raise ValueError(
                "--layout.half and --layout.offload want a process group also for one process: "
                "torchrun --nproc-per-node 1"
            )
        return Ranks(device=kind, timeout=timeout, layout=layout)

    device = own_device(kind)
    if _meeting.watcher is None or not _meeting.watcher.is_alive():
        _meeting.watcher = Watcher()
    if not dist.is_initialized():
        join(kind, device, timeout)
    # (a second start may have another layout)
    _meeting.mesh = None
    _meeting.rows = None
    agree({"layout": asdict(layout)})
    if layout.plain:
        return Ranks(dist.get_rank(), dist.get_world_size(), device, timeout, layout)

    # Coordinates, and who shares small numbers: the ranks of one stage
    mesh = mesh_of(layout, kind, timeout)
    _meeting.mesh = mesh
    if layout.pp > 1:
        _meeting.rows = group_of_rows(layout, timeout)
    rows = mesh["dp"]
    return Ranks(
        rows.get_local_rank(),
        rows.size(),
        device,
        timeout,
        layout,
        mesh,
        mesh["pp"].get_local_rank(),
    )


def group_of_rows(layout: Layout, timeout: float) -> dist.ProcessGroup:
    """The ranks of this one's pipeline stage, over gloo. Every rank makes the groups of all stages."""
    size = dist.get_world_size() // layout.pp
    patience = timedelta(seconds=timeout)
    groups = []
    for stage in range(layout.pp):
        members = list(range(stage * size, (stage + 1) * size))
        groups.append(dist.new_group(members, timeout=patience, backend="gloo"))
    return groups[dist.get_rank() // size]


def device_kind() -> str:
    """The kind of device to train on, unless one is named: CUDA, another accelerator, else the CPU."""
    if not torch.accelerator.is_available():
        return "cpu"
    kind = torch.accelerator.current_accelerator().type
    # a model of the toy's size is faster on the CPU than on MPS, where none of this was tried
    return "cpu" if kind == "mps" else kind


def own_device(kind: str) -> str:
    """The device of this rank, which becomes the current one. Raises ValueError when there are too few."""
    if kind == "cpu":
        return kind
    local = int(os.environ.get("LOCAL_RANK", 0))
    count = torch.accelerator.device_count()
    if local >= count:
        raise ValueError(
            f"rank {local} of this machine has no {kind} device of its own, there are {count}: "
            f"torchrun --nproc-per-node {count}, or --device cpu"
        )
    torch.accelerator.set_device_index(local)
    return f"{kind}:{local}"


def use_own_processors() -> None:
    """As many threads as processors that this process may use; OMP_NUM_THREADS says otherwise."""
    if "OMP_NUM_THREADS" in os.environ:
        return
    if hasattr(os, "sched_getaffinity"):
        processors = len(os.sched_getaffinity(0))
    else:
        processors = os.cpu_count() or 1
    neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    torch.set_num_threads(max(1, processors // neighbours))


def backend_for(kind: str) -> str:
    """gloo for what lies on the CPU, always; beside it what the accelerator's own transport is."""
    if kind == "cpu":
        return "gloo"
    return f"cpu:gloo,{kind}:{dist.get_default_backend_for_device(kind)}"


def join(kind: str, device: str, timeout: float) -> None:
    """The process group, over the rendezvous that the environment names."""
    one_node = os.environ.get("LOCAL_WORLD_SIZE", "") == os.environ["WORLD_SIZE"]
    loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    if one_node and loopback:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback[0])
    if one_node:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")

    patience = timedelta(seconds=timeout)
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=patience))
        dist.init_process_group(
            backend_for(kind),
            store=store,
            rank=rank,
            world_size=size,
            timeout=patience,
            device_id=None if kind == "cpu" else torch.device(device),
        )
    except RuntimeError as error:
        raise ConnectionError(
            f"rank {os.environ.get('RANK')}: not all {os.environ['WORLD_SIZE']} ranks met within "
            f"{timeout:g} s ({first_line(error)})"
        ) from error
    _meeting.store = dist.PrefixStore("nanosail", store)
    _meeting.timeout = timeout


def stop() -> None:
    """Leave together: a rank that is gone early breaks the last collective of those behind it."""
    if not dist.is_initialized():
        return
    total(0.0, everyone=True)
    dist.destroy_process_group()
    _meeting.store = None
    _meeting.mesh = None
    _meeting.rows = None
    if _meeting.watcher is not None:
        _meeting.watcher.leave()
        _meeting.watcher = None


class Watcher(threading.Thread):
    """Ends this process when its launcher is gone, however that died.

    The process is told to stop as by a scheduler (SIGTERM: the loop writes a checkpoint), and ends
    after `patience` seconds in any case. `leave` ends the thread before the interpreter ends: what
    a daemon does while that is taken apart is nobody's to say.
    """

    def __init__(self, every: float = 1.0, patience: float = ORPHAN):
        super().__init__(daemon=True)
        self.parent = os.getppid()
        self.every = every
        self.patience = patience
        self.over = threading.Event()
        self.start()

    def run(self) -> None:
        while os.getppid() == self.parent:
            if self.over.wait(self.every):
                return
        _say("the launcher is gone: this rank writes a checkpoint if it can, and ends")
        os.kill(os.getpid(), signal.SIGTERM)
        if not self.over.wait(self.patience):
            os._exit(128 + signal.SIGTERM)

    def leave(self) -> None:
        self.over.set()
        self.join()


def place() -> tuple[int, int]:
    """(rank, number of ranks) of this process among those that see different rows."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(_meeting.rows), dist.get_world_size(_meeting.rows)


def place_of_all() -> tuple[int, int]:
    """(rank, number of ranks) of this process among all, the stages of a pipeline counted."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


# -------------------------------------------------------------------- small numbers and objects


def total(*values: float, everyone: bool = False) -> list[float]:
    """Sum over ranks of each value, in float64, on the CPU: exact, and no device waits for it.

    Over the ranks that see different rows; everyone: over all stages of a pipeline as well.
    """
    if not dist.is_initialized():
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64)
    with named_failure():
        dist.all_reduce(sums, group=None if everyone else _meeting.rows)
    return sums.tolist()


def sum_where_it_lies(value: Tensor) -> Tensor:
    """Sum of a tensor over the ranks of `total`, on its own device: the host does not wait for it.

    A contiguous tensor is overwritten.
    """
    if not dist.is_initialized():
        return value
    value = value.contiguous()
    with named_failure():
        dist.all_reduce(value, group=large_group())
    return value


def gather(values: list, everyone: bool = False) -> list:
    """Python objects of all ranks, concatenated in rank order (metadata, rollouts, never weights).

    Over the same ranks as `total`. The transport is the CPU's: objects come as bytes on the CPU.
    """
    if not dist.is_initialized():
        return values
    group = None if everyone else _meeting.rows
    parts: list = [None] * dist.get_world_size(group)
    with named_failure():
        dist.all_gather_object(parts, values, group=group)
    return [value for part in parts for value in part]


def agree(items: dict[str, object], among: object = None) -> None:
    """Compare what must be equal on all ranks, before the first step.

    items: name -> a dict of options, or anything that JSON can hold (a digest, best). among: only ranks
    that give the same here are compared. Raises ValueError on every rank, which names each rank that
    differs from the first one, and in what.
    """
    plain = json.loads(json.dumps(items, default=str))
    firsts: dict = {}
    odd = []
    for rank, (group, other) in enumerate(gather([(among, plain)], everyone=True)):
        model, first = firsts.setdefault(group, (rank, other))
        for name in first:
            if other.get(name) != first[name]:
                what = detail(first, other, name)
                odd.append(f"rank {rank} has other {name} than rank {model}{what}")
    if odd:
        raise ValueError(
            f"the ranks were not started alike: {'; '.join(odd)}. Start all of them with the same "
            f"command, code, data and model"
        )


def detail(first: dict, other: dict, name: str) -> str:
    """What differs in an item, short: the first three options, or the ends of the two values.

    (Of code with changes the beginnings are alike: the commit that was changed.)
    """
    mine = first[name]
    theirs = other.get(name)
    if isinstance(mine, dict) and isinstance(theirs, dict):
        pairs = list(differences(mine, theirs).items())[:3]
        words = [f"{key} {new!r:.60} for {old!r:.60}" for key, (old, new) in pairs]
    else:
        words = [f"{str(theirs)[-20:]} for {str(mine)[-20:]}"]
    return printable(f" ({', '.join(words)})")


# ------------------------------------------------------------------------------ large tensors


def divide(
    values: list[Tensor], costs: list[float], work: Callable[[list[Tensor]], list[Tensor]]
) -> list[Tensor]:
    """work(values), each rank doing a run of neighbours of about equal cost and sending its results.

    Results have the shapes and the type of their values, which every rank has alike. Simplified:
    sharded values are gathered on all ranks, not only on the one that works on them.
    """
    rank, size = place()
    if size == 1 or not values:
        return work(values)

    # sharded values are made whole, and their results cut like them
    likes = values
    values = [whole(value) for value in values]

    # who does what: by where the middle of a value lies on the line of all costs
    ends = list(accumulate(costs))
    middles = [end - cost / 2 for end, cost in zip(ends, costs)]
    owners = [min(size - 1, int(size * middle / ends[-1])) for middle in middles]
    shares = [[v for v, owner in zip(values, owners) if owner == r] for r in range(size)]
    shares[rank] = work(shares[rank])

    # every rank sends its share in one piece; what others hold there is overwritten
    for owner, share in enumerate(shares):
        if not share:
            continue
        bucket = torch.cat([value.flatten() for value in share])
        with named_failure():
            dist.broadcast(bucket.view(torch.uint8), group=large_group(), group_src=owner)
        parts = bucket.split([value.numel() for value in share])
        shares[owner] = [part.view_as(value) for part, value in zip(parts, share)]
    results = [value for share in shares for value in share]
    return [cut_like(result, like) for result, like in zip(results, likes)]


def large_group() -> dist.ProcessGroup | None:
    """The ranks of `place` on the transport of large tensors; None: all."""
    return _meeting.mesh["dp"].get_group() if _meeting.mesh else None


def local(tensor: Tensor) -> Tensor:
    """The part of it that lies here, as a plain tensor; of a plain one all."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of it, on every rank that has a part: a collective for a sharded one."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def cut_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, alike on all ranks, sharded as another one is."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def share_of(tensor: Tensor) -> float:
    """What a sum over this rank's part counts for, so that all ranks' sums make that of the whole.

    1 where every rank holds the whole model, and no sum over ranks is wanted.
    """
    if _meeting.mesh is None:
        return 1.0
    if not isinstance(tensor, DTensor):
        return 1 / place()[1]
    lies = zip(tensor.device_mesh.shape, tensor.placements)
    return 1 / math.prod(ranks for ranks, how in lies if how.is_replicate())


def total_of_parts(*sums: float) -> list[float]:
    """Sums over parts, by `share_of`, of all ranks: one small collective over whatever meshes."""
    return total(*sums, everyone=True) if _meeting.mesh else list(sums)


def sum_gradients(parameters: list[Tensor]) -> None:
    """Sum the gradients of all ranks in place. A rank without one for a parameter adds zero.

    Those of sharded parameters were summed in the backward pass (scale/shard.py).
    """
    _, size = place()
    parameters = [p for p in parameters if not isinstance(p, DTensor)]
    if size == 1 or not parameters:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    bucket = torch.cat([parameter.grad.flatten() for parameter in parameters])
    with named_failure():
        dist.all_reduce(bucket, group=large_group())
    parts = bucket.split([parameter.numel() for parameter in parameters])
    for parameter, part in zip(parameters, parts):
        parameter.grad.copy_(part.view_as(parameter))


# -------------------------------------------------------------------------------- what fails


@contextmanager
def named_failure(mixed: bool = False) -> Iterator[None]:
    """A collective that fails or times out becomes a ConnectionError that names the missing ranks.

    mixed: there is other work among the collectives, whose own errors stay what they are.
    """
    try:
        yield
    except RuntimeError as error:
        if mixed and not from_transport(error):
            raise
        rank, _ = place_of_all()
        raise ConnectionError(
            f"rank {rank}: {missing_ranks()} (waited {_meeting.timeout:g} s at the most; "
            f"{first_line(error)})"
        ) from error


def from_transport(error: RuntimeError) -> bool:
    """Whether a collective failed; gloo's errors have no class of their own. (HCCL's: unchecked.)"""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def missing_ranks() -> str:
    """After a collective that failed: every rank that can leaves a note; who leaves none is missing."""
    rank, size = place_of_all()
    if _meeting.store is None:
        return "another rank did not take part in a collective"
    try:
        _meeting.store.set(note_of("here", rank), "yes")
        time.sleep(ROLL_CALL)
        absent = [str(r) for r in range(size) if not _meeting.store.check([note_of("here", r)])]
    except RuntimeError:
        return "the launcher is gone, and with it the other ranks"
    if not absent:
        return "a collective failed although all ranks are alive"
    return f"rank {', '.join(absent)} did not take part in a collective: ended, stopped or hanging"


def report_failure(error: BaseException) -> None:
    """Leave the reason where torchrun looks for it: its last lines then show it as the root cause."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not file:
        return
    reason = printable(f"rank {os.environ.get('RANK')}: {error}")
    extra = {"py_callstack": reason, "timestamp": str(int(time.time()))}
    try:
        with open(file, "w") as report:
            json.dump({"message": {"message": reason, "extraInfo": extra}}, report)
    except OSError:
        pass  # torchrun's own words must do


def leave_note(name: str, text: str = "yes") -> None:
    """Tell the other ranks something without a collective, while there is a rendezvous.

    See `wait_for_note` and `read_note`.
    """
    if _meeting.store is None:
        return
    try:
        _meeting.store.set(name, text)
    except RuntimeError:
        _say("no note can be left: the launcher is gone")


def read_note(name: str) -> str | None:
    """Another rank's note, if it is there by now: this does not wait."""
    if _meeting.store is None:
        return None
    try:
        return _meeting.store.get(name).decode() if _meeting.store.check([name]) else None
    except RuntimeError:
        return None


def wait_for_note(name: str, seconds: float) -> bool:
    """Whether another rank left this note within some seconds."""
    if _meeting.store is None:
        return False
    try:
        _meeting.store.wait([name], timedelta(seconds=seconds))
    except RuntimeError:
        return False
    return True


def all_come(name: str, seconds: float) -> bool:
    """Whether all ranks call this within some seconds: only then a collective is safe. `name`: new."""
    rank, size = place_of_all()
    if _meeting.store is None:
        return True
    leave_note(note_of(name, rank))
    deadline = time.monotonic() + seconds
    others = [note_of(name, other) for other in range(size)]
    return all(wait_for_note(other, max(deadline - time.monotonic(), 0.01)) for other in others)


def note_of(name: str, rank: int) -> str:
    """What a rank's note is called in this life: torchrun keeps its store when it starts ranks again."""
    return f"{name} {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')} {rank}"


def meet(name: str, each: Callable[[], None], every: float = 0.05) -> None:
    """Wait for all ranks, calling `each` meanwhile: a collective cannot be interrupted, this can.

    `name` must be new each time. Ranks that do not come are the next collective's affair, which
    names them.
    """
    rank, size = place_of_all()
    if _meeting.store is None:
        return
    names = [note_of(name, other) for other in range(size)]
    leave_note(names[rank])
    began = time.monotonic()
    while not are_left(names) and time.monotonic() - began < _meeting.timeout:
        each()
        time.sleep(every)


def are_left(names: list[str]) -> bool:
    """Whether these notes are there; not when the launcher is gone, which `Watcher` tells `each` of."""
    try:
        return _meeting.store.check(names)
    except RuntimeError:
        return False


def first_line(error: BaseException) -> str:
    return printable((str(error).splitlines() or [type(error).__name__])[0])[:200]


def _say(text: str) -> None:
    """To stderr, which may be gone with the launcher."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        pass
