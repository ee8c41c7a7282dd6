"""Expert parallelism: experts live on different ranks, and tokens travel to them and back.

What it teaches: a MoE layer that is spread over ranks is the same layer between two all-to-alls. Each
rank routes its own tokens as ever. Slots sorted by expert are sorted by rank too, so the rows for one
rank lie together; they are sent, the experts that live there compute, and the results come back into
the places that the rows came from. The way back is the gradient of the way there, and so the other
way round: two autograd functions, each the other's adjoint.

    rank 0   x (S, C) -> rows by expert | 0 0 1 | 2 3 3 |      ep = 2, four experts
    rank 1   x (S, C) -> rows by expert | 1 | 2 2 3 3 3 |
                                            |       |
             all-to-all, uneven             v       v
    rank 0 has experts 0, 1:  | 0 0 1 | 1 |    rank 1 has experts 2, 3:  | 2 3 3 | 2 2 3 3 3 |
             mixture_here, K = 1, then the same way back, and every token adds up its K rows

A routing weight travels with its row, so that what comes back needs nothing but to be added up, and
nobody keeps y (S*K, C) for the weights' gradient.

Ranks that sample need different numbers of passes, and an expert's rank must be there when a token comes:
`Rounds` lets them run in step, each at its own work.

Legend: S own tokens, C width, E experts, K experts a token, R rows that came. Ranks that get no row
still take part in every collective of the backward pass. Simplified: no capacity, nothing is dropped;
if all tokens of all ranks want one expert, they all go there.
"""

from dataclasses import dataclass
from typing import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from attention import Segments, attend_inside
from moe import Experts, combine_slots, mixture_here, slots_of
from scale.parallel import local, named_failure


@dataclass
class Journey:
    """Where the S*K slots of a rank go.

    order (S*K,): slots, sorted by expert. inverse (S, K): the place of each slot in that order. send,
    receive: how many rows go to each rank and come from it.
    """

    order: Tensor
    inverse: Tensor
    send: list[int]
    receive: list[int]
    group: dist.ProcessGroup

    def there(self, rows: Tensor) -> Tensor:
        """Rows in this rank's order -> the rows that came here (R, ..)."""
        return exchange(rows, self.send, self.receive, self.group)

    def back(self, rows: Tensor) -> Tensor:
        """A row for each that came (R, ..) -> rows in this rank's order."""
        return exchange(rows, self.receive, self.send, self.group)


def exchange(rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    """The first send[0] rows to rank 0, the next to rank 1, ..; what comes, in the order of ranks."""
    came = rows.new_empty(sum(receive), *rows.shape[1:])
    with named_failure():
        dist.all_to_all_single(came, rows.contiguous(), receive, send, group=group)
    return came


class ToExperts(torch.autograd.Function):
    """x (S, C), weights (S, K) -> the rows that came here (R, C) and their weights (R, 1)."""

    @staticmethod
    def forward(ctx, x: Tensor, weights: Tensor, journey: Journey):
        ctx.journey = journey
        token = journey.order // weights.shape[1]
        rows = journey.there(x.index_select(0, token))
        shares = journey.there(weights.reshape(-1, 1).index_select(0, journey.order))
        return rows, shares

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_rows: Tensor, grad_shares: Tensor):
        journey = ctx.journey
        d_x = combine_slots(journey.back(grad_rows), journey.inverse)
        d_weights = journey.back(grad_shares)[:, 0][journey.inverse]
        return d_x, d_weights, None


class FromExperts(torch.autograd.Function):
    """Weighted results (R, C) of the rows that came -> (S, C), each token the sum of its K."""

    @staticmethod
    def forward(ctx, y: Tensor, journey: Journey) -> Tensor:
        ctx.journey = journey
        return combine_slots(journey.back(y), journey.inverse)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        journey = ctx.journey
        token = journey.order // journey.inverse.shape[1]
        return journey.there(grad.index_select(0, token)), None


class MixtureElsewhere:
    """`moe.mixture_here` for experts that are spread over the ranks of `mesh`, with its signature."""

    def __init__(self, mesh: DeviceMesh):
        self.group = mesh.get_group()
        self.ranks = mesh.size()
        self.rounds: Rounds | None = None  # where each rank makes as many passes as it likes

    def __call__(
        self, x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor
    ) -> Tensor:
        """x (S, C), indices and weights (S, K), gate_up and down those of all ranks -> (S, C)."""
        gate_up = local(gate_up)  # (E / ranks, 2I, C)
        down = local(down)  # (E / ranks, C, I)
        journey, expert = self.plan(indices, gate_up.shape[0])

        rows, shares = ToExperts.apply(x, weights, journey)  # (R, C), (R, 1)
        if len(rows):
            y = mixture_here(rows, expert, shares, gate_up, down)
        else:
            # nothing came: a zero that hangs on all of it, since the others wait for the backward pass
            y = rows * shares.to(rows.dtype) + gate_up[:0].sum() + down[:0].sum()
        return FromExperts.apply(y, journey)

    def plan(self, indices: Tensor, here: int) -> tuple[Journey, Tensor]:
        """The journey of the slots that chose `indices` (S, K), and the experts (R, 1) of what comes.

        here: experts on this rank, which are numbered from 0.
        """
        # Sorted by expert, and so by rank
        slots = indices.reshape(-1)  # (S*K,)
        order = slots.argsort(stable=True)
        places = torch.arange(len(order), device=order.device)
        inverse = torch.empty_like(order).scatter_(0, order, places).view_as(indices)

        # How many rows for each expert, said to the rank that has it
        counts = slots_of(slots, self.ranks * here)
        theirs = torch.empty_like(counts)
        with named_failure():
            dist.all_to_all_single(theirs, counts, group=self.group)
        both = torch.stack([counts, theirs]).view(2, self.ranks, here)
        send, receive = both.sum(2).tolist()

        # Rows come by rank, and from each by expert
        experts = torch.arange(here, device=counts.device).repeat(self.ranks)
        expert = experts.repeat_interleave(theirs, output_size=sum(receive))
        return Journey(order, inverse, send, receive, self.group), expert[:, None]


def spread_experts(experts: Experts, mesh: DeviceMesh) -> None:
    """Keep this rank's run of the experts and send tokens to the others. In place.

    Raises ValueError when the experts do not divide over the ranks.
    """
    E = experts.gate_up_proj.shape[0]
    if E % mesh.size():
        raise ValueError(f"--layout.ep {mesh.size()} does not divide the model's {E} experts")
    for name, p in list(experts.named_parameters()):
        own = p.detach().chunk(mesh.size())[mesh.get_local_rank()].clone()
        cut = DTensor.from_local(own, mesh, [Shard(0)], run_check=False)
        setattr(experts, name, nn.Parameter(cut, requires_grad=p.requires_grad))
    experts.mixture = MixtureElsewhere(mesh)


# ------------------------------------------------------------------------------ each at its own work


class Rounds:
    """Forward passes in step, of ranks that share experts and sample or evaluate each for itself.

    Every pass begins with a word: a rank says that it has one to make. A rank that has none left keeps
    the others company with passes of one token, in `catch_up`, until nobody says so any more.

        rank 0   prefill   decode   decode   decode   company   company   ended
        rank 1   prefill   decode   prefill  decode   decode    decode    ended

    What passes of different ranks are does not matter: in a layer they meet in its all-to-alls alone.
    """

    def __init__(self, model: nn.Module, group: dist.ProcessGroup):
        self.model = model
        self.group = group
        self.company = False
        model.language_model.register_forward_pre_hook(self.announce)

    def announce(self, *_) -> None:
        if not self.company:
            self.anyone(True)

    def anyone(self, busy: bool) -> bool:
        """Whether any rank has a pass to make, this one included."""
        count = torch.tensor([int(busy)])  # on the CPU: its transport, and no wait for the device
        with named_failure():
            dist.all_reduce(count, group=self.group)
        return bool(count)

    @torch.no_grad()
    def catch_up(self, each: Callable[[], None]) -> None:
        llm = self.model.language_model
        device = llm.lm_head.weight.device
        alone = attend_inside(Segments.of([1], device), causal=True)
        token = torch.zeros(1, dtype=torch.long, device=device)
        while self.anyone(False):
            self.company = True
            llm(llm.embed(token), token, alone)
            self.company = False
            each()


def no_matter() -> None:
    """Nothing more can end this wait."""


def catch_up(model: nn.Module, each: Callable[[], None] = no_matter) -> None:
    """Wait for the ranks that share this model's experts, where they make passes of their own.

    each: called meanwhile, between two passes; it may raise to end the wait.
    """
    for module in model.modules():
        mixture = getattr(module, "mixture", None)
        if isinstance(mixture, MixtureElsewhere) and mixture.rounds:
            mixture.rounds.catch_up(each)
            return
