"""Pipeline parallelism: the language model's layers spread over ranks, one run of them after another.

What it teaches: a stage of a pipeline needs no model file of its own. Take the whole model, put a
module that returns its input in the place of everything that another rank holds, and `LLM.forward`,
all names and all objectives stay as they are. What is left is when to run what, and that is a
schedule of torch.distributed.pipelining: hidden states travel forward, their gradients come back.

    rank 0   ViT, adapter, embedding, layers 0..1  --hidden-->  layers 2..3, norm, head   rank 1
                                                  <-gradient--

    time ->              1f1b on two ranks, four micro-batches; F forward, B backward
    rank 0   F0 F1 .. B0 F2 .. B1 F3 .. B2 .. B3
    rank 1      F0 B0 .. F1 B1 .. F2 B2 .. F3 B3

    gpipe         all forwards, then all backwards: simplest, and every micro-batch is kept
    1f1b          a backward as soon as there is one: at most as many are kept as there are stages
    interleaved   1f1b with two runs of layers on each rank: half of the time in which ranks wait

In a mixture of experts the sums that the router's losses are made of (`moe.RouterSums`) travel with
the hidden state, so that balance is of all layers together and the last stage alone knows it.

Every rank of a pipeline reads the same rows and takes from them what it needs. Gradients are summed
over copies and shards as ever (FSDP on each section; train.one_step).

Legend: a *section* is a run of layers with what belongs to its end; S tokens of a micro-batch, C model
width, E experts. Simplified: no zero-bubble schedules; pictures are decoded on every rank of a pipeline;
torch keeps two buffers of a hidden state for every micro-batch of a step, and sums a section's gradients
when the last one is through: till then they are whole and the weights gathered (as `--layout.zero 1`).
"""

from dataclasses import dataclass
from datetime import timedelta
from itertools import accumulate
from typing import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
)

from moe import Decisions, RouterSums, router_sums
from objective import fetch, own_counts
from packing import Batch
from scale import parallel
from scale.layout import Layout
from scale.parallel import Ranks
from stage import BaseStage
from vlm import SailVL

SCHEDULE_CLASSES = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
}
SECTIONS = {"gpipe": 1, "1f1b": 1, "interleaved": 2}  # on each rank
# Our choice, a guess: shares of tokens by which layers are counted out. Only the balance hangs on them.
VISUAL = 0.5
LABELLED = 0.25
PATCHES_A_TOKEN = 4


# ------------------------------------------------------------------------------- who holds what


class Elsewhere(nn.Module):
    """In the place of a module that another rank holds: what comes in goes out."""

    # as `moe.MoE` has one: it is moved with the others' and chooses nothing
    bias: Tensor | None = None

    @property
    def mlp(self) -> "Elsewhere":
        return self

    def forward(self, x: Tensor, *rest) -> Tensor:
        return x


def layers_of(model: SailVL, sections: int) -> list[range]:
    """The layers of each section: neighbours, at least one, of about equal cost.

    A token costs as many multiplications as it meets parameters. model: may be on the meta device.
    """
    text = model.config.text
    idle = 1 - text.num_experts_per_tok / text.num_experts if text.num_experts else 0.0
    costs = []
    for block in model.language_model.model.layers:
        parameters = block.named_parameters()
        costs.append(sum(p.numel() * (1 - idle * (".experts." in name)) for name, p in parameters))

    # What the ends have besides: patches (four make a visual token), and logits where there are labels
    patches = PATCHES_A_TOKEN * VISUAL
    costs[0] += patches * sum(p.numel() for p in model.vision_model.parameters())
    costs[-1] += LABELLED * model.language_model.lm_head.weight.numel()
    cuts = even_cuts(costs, sections)
    return [range(start, end) for start, end in zip(cuts, cuts[1:])]


def even_cuts(costs: list[float], sections: int) -> tuple[int, ...]:
    """Where to cut a row of costs, 0, .., len(costs): the sum of the sections' squared costs is least."""
    ends = [0, *accumulate(costs)]
    # where k sections end -> (sum of their squares, their cuts), k = 0, 1, ..
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, (0,))}
    for _ in range(sections):
        longer = {}
        for end in range(1, len(ends)):
            choices = [
                (squares + (ends[end] - ends[start]) ** 2, (*cuts, end))
                for start, (squares, cuts) in best.items()
                if start < end
            ]
            if choices:
                longer[end] = min(choices)
        best = longer
    return best[len(costs)][1]


def adopt(part: SailVL, model: SailVL, layers: list[int]) -> None:
    """Fill `part` with the model's own modules of these layers, and `Elsewhere` for all others.

    The first layer brings ViT, adapter and embedding with it, the last one the norm and the head.
    """
    trunk = model.language_model.model
    count = len(trunk.layers)
    first = 0 in layers
    last = count - 1 in layers

    part.vision_model = model.vision_model if first else Elsewhere()
    part.mlp1 = model.mlp1 if first else Elsewhere()
    own = part.language_model
    own.model.embed_tokens = trunk.embed_tokens if first else Elsewhere()
    own.model.norm = trunk.norm if last else Elsewhere()
    own.lm_head = model.language_model.lm_head if last else Elsewhere()
    for i in range(count):
        own.model.layers[i] = trunk.layers[i] if i in layers else Elsewhere()


@dataclass(frozen=True)
class Work:
    """A step as a rank of a pipeline does it: what `train.one_step` knows."""

    batches: list[Batch]  # micro-batches
    objective: Callable  # (model, batch, stage) -> loss, statistics
    stage: BaseStage
    weight: float  # of the whole step, over all ranks
    device: str
    precision: torch.autocast


class Section(SailVL):
    """A run of layers as a model of its own, which an objective can be given.

    A schedule calls it, one micro-batch after another. Its `embed` is what the section before sent.
    """

    def __init__(self, model: SailVL, layers: range):
        with torch.device("meta"):
            super().__init__(model.config)
        adopt(self, model, list(layers))
        self.image_token_id = model.image_token_id
        self.first = layers.start == 0
        self.last = layers.stop == model.config.text.num_hidden_layers
        self.sends: tuple[Tensor, ...] = ()  # what the next section expects
        self.begin(None)

    def begin(self, work: Work | None) -> None:
        """A new step; None: let go of the last one."""
        self.work = work
        self.arrived: tuple[Tensor, ...] = ()  # of the micro-batch at hand
        self.done = 0  # micro-batches: every schedule takes them in their order
        self.statistics: list[dict] = []  # of the objective, by micro-batch

    def embed(self, input_ids: Tensor, images: Tensor | list[Tensor] | None) -> Tensor:
        if self.first:
            return super().embed(input_ids, images)
        return self.arrived[0]

    def forward(self, *arrived: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The next micro-batch: what the section before sent -> what the next one gets, or the loss."""
        self.arrived = arrived
        work = self.work
        batch = work.batches[self.done].to(work.device)
        self.done += 1
        with work.precision:
            if not self.last:
                return self.run_layers(batch)
            loss, statistics = work.objective(self, batch, work.stage)
        self.statistics.append(statistics)
        return loss / work.weight

    def hidden(self, *batch, routing: Decisions | None = None, **more) -> Tensor:
        """As of the whole model; `routing` knows of the layers before these."""
        if routing is not None and not self.first:
            routing.earlier = RouterSums(*self.arrived[1:])
        return super().hidden(*batch, routing=routing, **more)

    def run_layers(self, batch: Batch) -> tuple[Tensor, ...]:
        """What goes to the next section: hidden (S, C), with experts the router's sums so far."""
        routing = Decisions() if self.config.text.num_experts else None
        given = (batch.ids, batch.images, batch.positions, batch.segments)
        hidden = self.hidden(*given, routing=routing)
        sent = (hidden,)
        if routing is not None:
            counts = own_counts(routing, batch, self.image_token_id)
            sent += router_sums(routing, counts, batch.real_at)
        for tensor, expected in zip(sent, self.sends, strict=True):
            assert (tensor.shape, tensor.dtype) == (expected.shape, expected.dtype), (
                f"a section sends {tensor.dtype} {tuple(tensor.shape)}, the next one waits for "
                f"{expected.dtype} {tuple(expected.shape)}"
            )
        return sent


# ------------------------------------------------------------------------------------ one rank


class Staged(SailVL):
    """What one rank of a pipeline holds, under the names that it has in the whole model.

    Optimizers, clipping and checkpoints see this. It runs whole steps (`passes`) and nothing else. Its
    sections hold the very same modules. Raises ValueError for a model that cannot be cut like this.
    """

    def __init__(self, model: SailVL, ranks: Ranks):
        layout = ranks.layout
        check_cut(model, layout)
        with torch.device("meta"):
            super().__init__(model.config)
        self.image_token_id = model.image_token_id
        self.ranks = ranks

        # Sections go around the ranks, and around again
        turns = SECTIONS[layout.schedule]
        runs = layers_of(model, layout.pp * turns)
        mine = range(ranks.stage, len(runs), layout.pp)
        self.runs = runs
        self.sections = {number: Section(model, runs[number]) for number in mine}
        adopt(self, model, [layer for number in mine for layer in runs[number]])

        self.line = line_of_stages(ranks)
        self.schedules: dict[tuple[int, int], object] = {}  # by micro-batches and their tokens

    def embed(self, input_ids: Tensor, images: Tensor | list[Tensor] | None) -> Tensor:
        raise ValueError(
            "--layout.pp: one rank of a pipeline holds a part of the model and cannot answer; ask a "
            "saved model, without --layout.pp"
        )

    def passes(self, work: Work) -> list[dict]:
        """Forward and backward of a step; what the objective said of each micro-batch, on all stages.

        Raises what an objective raises.
        """
        for section in self.sections.values():
            section.language_model.recompute = self.language_model.recompute
            section.begin(work)
        sizes = {batch.ids.numel() for batch in work.batches}
        if len(sizes) > 1:
            raise ValueError(
                f"--layout.pp: micro-batches of one size are wanted, not of {sizes} tokens"
            )
        schedule = self.schedule(len(work.batches), sizes.pop())

        # A loss of its own for each micro-batch: targets are only counted
        try:
            schedule.step(target=torch.empty(len(work.batches)), return_outputs=False)
        except RuntimeError as error:
            # What a section raised comes wrapped
            if error.__cause__ is None:
                raise
            raise error.__cause__ from None

        # The last section alone has something to say
        *_, last = self.sections.values()
        said = [fetch(last.statistics)]
        with parallel.named_failure():
            dist.broadcast_object_list(said, group=self.line, group_src=self.ranks.layout.pp - 1)
        for section in self.sections.values():
            section.begin(None)
        return said[0]

    @torch.no_grad()
    def copy_whole(self, plain: SailVL) -> None:
        """Every parameter of all stages into a plain model, on every rank. All ranks together."""
        own = dict(self.named_parameters())
        names: list = [None] * self.ranks.layout.pp
        with parallel.named_failure():
            dist.all_gather_object(names, set(own), group=self.line)

        # One at a time, from the stage that has it
        group = self.ranks.mesh["pp"].get_group()
        for name, target in plain.named_parameters():
            if name in own:
                target.copy_(parallel.whole(own[name]))
            holder = next(stage for stage, held in enumerate(names) if name in held)
            with parallel.named_failure():
                dist.broadcast(target, group=group, group_src=holder)

        # What moves the routers' choice is known to all
        layers = zip(self.language_model.model.layers, plain.language_model.model.layers)
        for here, there in layers:
            there.mlp.bias = getattr(here.mlp, "bias", None)

    def schedule(self, count: int, tokens: int):
        """The schedule of `count` micro-batches of `tokens` tokens each."""
        key = (count, tokens)
        if key in self.schedules:
            return self.schedules[key]

        # Each section with the shapes of what comes in and what goes out
        group = self.ranks.mesh["pp"].get_group()
        stages = []
        for number, section in self.sections.items():
            run = self.runs[number]
            before = () if section.first else self.between(tokens, run.start)
            after = self.between(tokens, run.stop)
            if section.last:
                after = (torch.empty((), device="meta"),)
            section.sends = after
            stage = PipelineStage(
                section,
                number,
                len(self.runs),
                torch.device(self.ranks.device),
                input_args=before,
                output_args=after,
                group=group,
            )
            stages.append(stage)

        # Fewer micro-batches than stages: there is nothing to alternate
        layout = self.ranks.layout
        few = layout.schedule == "1f1b" and count < layout.pp
        kind = SCHEDULE_CLASSES["gpipe" if few else layout.schedule]
        check_count(count, layout)
        if self.ranks.main:
            print(waiting(count, layout), flush=True)
        what = stages if layout.schedule == "interleaved" else stages[0]
        made = kind(what, count, loss_fn=lambda loss, _: loss, scale_grads=False)
        self.schedules[key] = made
        return made

    def between(self, tokens: int, layers: int) -> tuple[Tensor, ...]:
        """What is sent after so many layers, as tensors without memory: shapes are said, never tried out.

        (To find them out, torch would run the model on memory that nobody has written.)
        """
        text = self.config.text
        dtype = next(self.parameters()).dtype
        with torch.device("meta"):
            wide = torch.bfloat16 if self.ranks.layout.half else dtype
            hidden = torch.empty(tokens, text.hidden_size, dtype=wide).requires_grad_()  # (S, C)
            if not text.num_experts:
                return (hidden,)

            # As the router, in fp32 at least
            precise = torch.promote_types(dtype, torch.float32)
            counts = torch.empty(2, layers, text.num_experts)
            probabilities = torch.empty(text.num_experts, dtype=precise).requires_grad_()
            squares = torch.empty((), dtype=precise).requires_grad_()
            decisions = torch.empty((), dtype=precise)
        return hidden, *RouterSums(counts, probabilities, squares, decisions)


# ------------------------------------------------------------------------- groups, and refusals


def line_of_stages(ranks: Ranks) -> dist.ProcessGroup:
    """The ranks of one pipeline, first stage first, over the CPU's transport: for small objects.

    Every rank makes the groups of all pipelines.
    """
    patience = timedelta(seconds=ranks.timeout)
    groups = []
    for start in range(ranks.size):
        members = list(range(start, dist.get_world_size(), ranks.size))
        groups.append(dist.new_group(members, timeout=patience, backend="gloo"))
    return groups[ranks.rank]


def check_cut(model: SailVL, layout: Layout) -> None:
    """Raises ValueError for a model that cannot be cut into the stages of a layout."""
    sections = layout.pp * SECTIONS[layout.schedule]
    layers = model.config.text.num_hidden_layers
    if layers < sections:
        raise ValueError(
            f"--layout.pp {layout.pp}: the language model has {layers} layers, {layout.schedule} wants at "
            f"least {sections}, one for each of its runs"
        )
    if model.config.text.tie_word_embeddings:
        raise ValueError(
            f"--layout.pp {layout.pp}: embedding and head of this model are one tensor, which the first "
            "and the last stage would both need; use --layout.shard instead"
        )


def check_count(count: int, layout: Layout) -> None:
    """Raises ValueError for a number of micro-batches that a schedule cannot divide."""
    rounds = max(1, count // layout.pp)
    if layout.schedule == "interleaved" and count % rounds:
        near = [
            n for n in (count // layout.pp * layout.pp, -(-count // layout.pp) * layout.pp) if n
        ]
        raise ValueError(
            f"--layout.schedule interleaved: {count} micro-batches a step do not divide into {rounds} "
            f"rounds of {layout.pp} ranks; choose --accumulate {' or '.join(map(str, near))}"
        )


def waiting(count: int, layout: Layout) -> str:
    """One line: the share of a step in which ranks wait for the first and the last micro-batch."""
    work = count * SECTIONS[layout.schedule]
    idle = (layout.pp - 1) / (work + layout.pp - 1)
    return (
        f"pipeline: {layout.pp} stages ({layout.schedule}), {count} micro-batches a step: ranks wait "
        f"{idle:.0%} of the time, if all stages are equally long; more --accumulate makes it less"
    )
