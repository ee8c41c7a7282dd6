"""How many processes share one model: the options, and the mesh that they make.

What it teaches: every kind of parallelism is a way of giving ranks coordinates. The number of ranks is
a product, each factor is one axis of a mesh, and each collective runs along one axis (or along a few
that were laid end to end), so that no two of them need to know of each other.

    8 ranks, --layout.copies 2 --layout.shard 4 --layout.ep 2

      copy 0   ep 0  ep 1        copy 1   ep 0  ep 1
      efsdp 0    0     1         efsdp 0    4     5      experts    cut over ep, then over efsdp
      efsdp 1    2     3         efsdp 1    6     7      the rest   cut over shard = efsdp x ep
                                                         gradients  summed over copies as well

    axis     ranks that differ in it
    pp       hold other layers                          (scale/pipeline.py)
    copy     hold the same shards of other copies       (HSDP)
    shard    hold other shards of the dense weights     (FSDP; scale/shard.py)
    ep       hold other experts                         (scale/experts.py)
    efsdp    hold other shards of the same experts
    dp       see other rows: copy x shard

Neighbours in rank differ in the last axes, so what talks most (experts, then shards) stays inside a
node, and copies and stages talk between nodes.
"""

from dataclasses import dataclass, replace
from datetime import timedelta

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

# Axis (and "dense", "sparse": copy with shard, with efsdp) -> the ranks that differ in it
Mesh = dict[str, DeviceMesh]
AXES = ("pp", "copy", "shard", "efsdp", "ep", "dp")
SCHEDULES_OF_STAGES = ("gpipe", "1f1b", "interleaved")


@dataclass(frozen=True)
class Layout:
    """How the model lies on the ranks: pp * copies * shard of them."""

    pp: int = 1  # pipeline stages, each a run of the language model's layers
    copies: int = 0  # copies of the (sharded) model; 0: as many as the ranks allow
    shard: int = 1  # ranks that share one copy's weights, gradients and optimizer state
    ep: int = 1  # of those, ranks that share the experts; divides shard
    zero: int = 3  # 3: sharded weights are freed after use, 2: kept for the step, 1: gradients, too
    offload: bool = False  # keep weights, gradients and optimizer state in host memory
    half: bool = False  # send weights as bf16; their masters, and routers, stay fp32
    schedule: str = "1f1b"  # of the pipeline: gpipe, 1f1b, interleaved

    @property
    def plain(self) -> bool:
        """Whether every rank holds the whole model, as without any option."""
        return self.pp == self.shard == 1 and not self.offload and not self.half

    def fitted(self, ranks: int) -> "Layout":
        """The same with its copies counted.

        Raises ValueError for numbers that cannot be, and when pp * copies * shard is not `ranks`.
        """
        # Numbers that cannot be
        for name in ("pp", "shard", "ep"):
            if getattr(self, name) < 1:
                raise ValueError(f"--layout.{name} {getattr(self, name)}: at least 1")
        if self.copies < 0:
            raise ValueError(f"--layout.copies {self.copies}: at least 1, or 0 for all that fit")
        if self.shard % self.ep:
            raise ValueError(
                f"--layout.ep {self.ep} does not divide --layout.shard {self.shard}: the ranks that "
                "share the experts are among those that share the rest"
            )
        if self.zero not in (1, 2, 3):
            raise ValueError(f"--layout.zero {self.zero}: choose 1, 2 or 3")
        if self.schedule not in SCHEDULES_OF_STAGES:
            raise ValueError(
                f"--layout.schedule {self.schedule}: choose from {', '.join(SCHEDULES_OF_STAGES)}"
            )

        # Choices that nothing would read
        if self.schedule != "1f1b" and self.pp == 1:
            raise ValueError(f"--layout.schedule {self.schedule}: it needs --layout.pp")
        if self.zero != 3 and (self.plain or self.pp > 1):
            raise ValueError(
                f"--layout.zero {self.zero}: it needs --layout.shard, and no --layout.pp (whose "
                "schedules sum gradients once a step)"
            )

        # A product, or the nearest one
        one_copy = self.pp * self.shard
        copies = self.copies or max(1, ranks // one_copy)
        if copies * one_copy != ranks:
            if self.copies:
                near = [copies * one_copy]
            else:
                near = [copies * one_copy, (copies + 1) * one_copy]
            raise ValueError(
                f"--layout: {self.pp} stages x {copies} copies x {self.shard} shards are "
                f"{copies * one_copy} ranks, but there are {ranks}: start "
                f"{' or '.join(map(str, near))}, or change --layout"
            )
        return replace(self, copies=copies)


def mesh_of(layout: Layout, kind: str, timeout: float) -> Mesh:
    """The axes of a fitted layout, over all ranks.

    kind: of the device that large tensors are on. timeout: seconds, of the groups of all axes, which
    would wait for half an hour otherwise, whatever the first group was told.
    """
    mesh = axes_of(layout, kind)
    patience = timedelta(seconds=timeout)
    for axis in AXES:
        group = mesh[axis].get_group()
        for device in group._device_types:
            group._get_backend(device)._set_default_timeout(patience)
    return mesh


def axes_of(layout: Layout, kind: str) -> Mesh:
    """The same with the timeouts that groups have by themselves."""
    # The same ranks seen twice: dense weights by shard, experts by efsdp and ep
    size = (layout.pp, layout.copies, layout.shard)
    dense = init_device_mesh(kind, size, mesh_dim_names=("pp", "copy", "shard"))
    experts = (layout.shard // layout.ep, layout.ep)
    sparse = dense._unflatten(2, experts, ("efsdp", "ep"))
    return {
        "pp": dense["pp"],
        "copy": dense["copy"],
        "shard": dense["shard"],
        "efsdp": sparse["efsdp"],
        "ep": sparse["ep"],
        "dp": dense["copy", "shard"]._flatten("dp"),
        "dense": dense["copy", "shard"],
        "sparse": sparse["copy", "efsdp"],
    }
