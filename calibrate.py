"""Entropy calibration: spread a language model's experts over pictures before it is trained on any.

What it teaches: a router learned on text sends whatever looks unlike text to a few experts. SAIL-VL2
(section 2.2) reports "data probing and automatic calibration on language data, which maximizes expert
activation entropy", that text behaviour is kept and that entropy on multimodal data rises; it
publishes no procedure. Everything below is therefore ours: a bound that keeps text behaviour, and the
better of two designs (`python -m claims.calibration` measures both).

    text-only samples ----> model --> what every router saw, text (S1, C)   --+
    samples with pictures > model --> the same of visual tokens (S2, C)     --+
                                                                             \\|/
    spread_router    gradient steps on one gate alone: more entropy of the mean choice on visual
                     tokens, while a KL term holds every text token's choice
    apply_bounded    the largest step towards it that leaves text loss and text entropy within 1 %

Why the gates: visual tokens lie in directions that text hardly uses, so a gate can be turned there
and leave text as it is. And a gate is in the released layout, so that the result is a model like any
other. No label is used.

Legend: S tokens, C width, E experts. Entropy is that of the load: -sum f log f of the shares f of
routed slots, in nats, mean over layers; log E is the most.

    python calibrate.py --model start --data my.jsonl --out start-calibrated
    python calibrate.py --model runs/toy-moe/language --out runs/calibrated     # the drawn world

`--data` must hold samples of both kinds, or `--text` the text-only ones. Simplified: one process; the
inputs of every router are kept, tokens x width x layers numbers of each kind.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterable, Iterator, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import moe
from data.encode import Encoder
from data.readers import Folder
from data.sample import BadSample, Document, Faults, Sample
from data.world import FAMILIES, World
from generate import load_model
from infra.cli import command
from packing import Batch, collate
from vlm import SailVL

# Apply a share, 0 to 1, of a calibration to a model, in place.
Change = Callable[[SailVL, float], None]
# model, text batches, picture batches -> what to change
Design = Callable[[SailVL, list[Batch], list[Batch]], Change]
SHARES = (1, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 0)


# -------------------------------------------------------------------------------- what is measured


@dataclass
class Assessment:
    """Of one model. use: (2: text and vision, layers, E) share of the routed slots."""

    text_loss: float
    use: Tensor

    @property
    def text_entropy(self) -> float:
        """Nats, mean over layers."""
        return float(moe.entropy(self.use[0]).mean())

    @property
    def visual_entropy(self) -> float:
        """Nats, mean over layers."""
        return float(moe.entropy(self.use[1]).mean())


@torch.no_grad()
def assess(model: SailVL, text: list[Batch], pictures: list[Batch]) -> Assessment:
    """Loss and loads of text from text-only batches, loads of visual tokens from pictures."""
    layers = len(model.language_model.model.layers)
    use = torch.zeros(2, layers, model.config.text.num_experts)

    # Text: its loss and its loads.
    losses = []
    for batch in text:
        labels = batch.labels.reshape(-1)
        at = (labels >= 0).nonzero()[:, 0]
        routing = moe.Decisions()
        logprobs = model.logprobs(
            batch.ids,
            batch.images,
            batch.positions,
            batch.segments,
            at,
            labels[at],
            routing=routing,
        )
        losses.append(-logprobs)
        use[0] += moe.tokens_per_expert(routing, text_tokens(model, batch)).cpu()

    # Pictures: the loads of their visual tokens.
    for batch in pictures:
        routing = moe.Decisions()
        model.hidden(batch.ids, batch.images, batch.positions, batch.segments, routing=routing)
        use[1] += moe.tokens_per_expert(routing, visual_tokens(model, batch)).cpu()

    return Assessment(float(torch.cat(losses).mean()), use / use.sum(-1, keepdim=True))


def visual_tokens(model: SailVL, batch: Batch) -> Tensor:
    """(B*T,) bool: where visual tokens stand."""
    return batch.ids.reshape(-1) == model.image_token_id


def text_tokens(model: SailVL, batch: Batch) -> Tensor:
    """(B*T,) bool: real tokens that are not visual."""
    return batch.real() & ~visual_tokens(model, batch)


# ----------------------------------------------------------------------------------- the procedure


def calibrate(
    model: SailVL,
    text: list[Batch],
    pictures: list[Batch],
    design: Design | None = None,
    bound: float = 0.01,
) -> float:
    """The whole procedure, in place; returns the share of the change that the bound allowed.

    design: `by_router` if none is given. Raises ValueError for a dense model, or when a list has no
    batch of its kind.
    """
    # What it cannot work with.
    if not model.config.text.num_experts:
        raise ValueError(
            "calibration is for mixture-of-experts models; this one is dense (num_experts 0)"
        )
    if all(visual_tokens(model, batch).any() for batch in text):
        raise ValueError("no text-only batch among the text batches given to calibrate")
    if not any(visual_tokens(model, batch).any() for batch in pictures):
        raise ValueError("no visual batch among the picture batches given to calibrate")

    design = design or by_router
    change = design(model, text, pictures)
    return apply_bounded(model, change, text, pictures, bound)


def by_router(
    model: SailVL,
    text: list[Batch],
    pictures: list[Batch],
    steps: int = 150,
    lr: float = 3e-3,
    hold: float = 100.0,
) -> Change:
    """A better gate for every layer.

    A layer is fitted to what it saw before the layers below it changed: one pass, no gradient
    through the model.
    """
    # One forward pass over the probes, by the model as it is.
    text_inputs = router_inputs(model, text, visual=False)
    visual_inputs = router_inputs(model, pictures, visual=True)

    # Each gate by itself.
    old_gates = []
    new_gates = []
    for layer, block in enumerate(model.language_model.model.layers):
        old = block.mlp.gate.weight.detach().float()
        old = old.clone()  # `apply` writes into the original
        new = spread_router(old, text_inputs[layer], visual_inputs[layer], steps, lr, hold)
        old_gates.append(old)
        new_gates.append(new)

    @torch.no_grad()
    def apply(model: SailVL, share: float) -> None:
        for block, old, new in zip(model.language_model.model.layers, old_gates, new_gates):
            block.mlp.gate.weight.copy_(torch.lerp(old, new, share))

    return apply


def spread_router(
    gate: Tensor, x_text: Tensor, x_visual: Tensor, steps: int, lr: float, hold: float
) -> Tensor:
    """A gate W (E, C) near the given one that minimises, on cached inputs (tokens, C),

    -H(mean over visual tokens of softmax(x W^T)) + hold * KL(old choice || new choice on text).
    """
    new = gate.clone().requires_grad_()
    old_choice = F.log_softmax(x_text @ gate.T, -1)  # (S1, E)
    optimizer = torch.optim.Adam([new], lr=lr)
    for _ in range(steps):
        visual_load = F.softmax(x_visual @ new.T, -1).mean(0)  # (E,)
        new_choice = F.log_softmax(x_text @ new.T, -1)
        drift = F.kl_div(new_choice, old_choice, log_target=True, reduction="batchmean")
        loss = hold * drift - moe.entropy(visual_load)

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return new.detach()


@torch.no_grad()
def router_inputs(model: SailVL, batches: list[Batch], visual: bool) -> list[Tensor]:
    """What the gate of every layer sees, (tokens, C) each: visual tokens, or real text tokens."""
    layers = model.language_model.model.layers
    seen: list[list[Tensor]] = [[] for _ in layers]
    keep = None  # of the batch at work

    def listen(into: list[Tensor]) -> Callable:
        def hook(gate: torch.nn.Module, inputs: tuple[Tensor]) -> None:
            into.append(inputs[0][keep].float())

        return hook

    # A hook on every gate, for as long as the batches run.
    hooks = []
    for block, into in zip(layers, seen):
        hooks.append(block.mlp.gate.register_forward_pre_hook(listen(into)))
    for batch in batches:
        keep = visual_tokens(model, batch) if visual else text_tokens(model, batch)
        model.hidden(batch.ids, batch.images, batch.positions, batch.segments)
    for hook in hooks:
        hook.remove()
    return [torch.cat(parts) for parts in seen]


def apply_bounded(
    model: SailVL, change: Change, text: list[Batch], pictures: list[Batch], bound: float
) -> float:
    """Apply the largest share, 1, 1/2, 1/4, ..., of a change that keeps text behaviour. In place.

    Neither text loss (upwards) nor text entropy may move by more than `bound`, relative, on the given
    batches. Returns the share: 0 when none of eight passes, and the model is as it was.
    """
    # How far text may move.
    before = assess(model, text, pictures)
    largest_loss = (1 + bound) * before.text_loss
    largest_move = bound * before.text_entropy

    # Ever smaller steps, the last of which is none.
    for share in SHARES:
        change(model, share)
        now = assess(model, text, pictures)
        moved = abs(now.text_entropy - before.text_entropy)
        if now.text_loss <= largest_loss and moved <= largest_move:
            break
    return share


# ----------------------------------------------------------------------------------------- its data


def collect(
    samples: Iterable[Sample | BadSample], encoder: Encoder, faults: Faults, wanted: dict[str, int]
) -> dict[str, list[Document]]:
    """Documents of each wanted kind, "text" (no picture) or "pictures", in the samples' order.

    wanted: kind -> about how many tokens. What cannot be used is counted.
    """
    found: dict[str, list[Document]] = {kind: [] for kind in wanted}
    lacking = dict(wanted)
    for sample in samples:
        # Enough of everything, or nothing to use.
        if max(lacking.values()) <= 0:
            break
        if isinstance(sample, BadSample):
            faults.add(sample)
            continue

        # Its kind is known before its pictures are decoded.
        parts = [part for message in sample.messages for part in message.parts]
        kind = "text" if all(isinstance(part, str) for part in parts) else "pictures"
        if lacking.get(kind, 0) <= 0:
            continue
        try:
            document = encoder(sample)
        except BadSample as fault:
            faults.add(fault)
            continue
        found[kind].append(document)
        lacking[kind] -= len(document)
    return found


def probe_batches(documents: list[Document], tokens: int, pad: int) -> list[Batch]:
    """One row a batch, of whole documents: at least one, and no more than `tokens` if it can be."""
    rows: list[list[Document]] = []
    room = 0
    for document in documents:
        if len(document) > room:
            rows.append([])
            room = tokens
        rows[-1].append(document)
        room -= len(document)
    return [collate([row], None, pad) for row in rows]


# -------------------------------------------------------------------------------------- the command


@dataclass
class CalibrateOptions:
    """Spread the routers of a mixture-of-experts model over visual tokens, and save the result."""

    model: Path  # directory of a trained MoE
    out: Path  # directory for the calibrated model
    data: Path | None = None  # samples of both kinds (data/readers.py); none: the drawn world
    images: Path | None = None  # folder of its images; none: beside the file
    text: Path | None = None  # text-only samples, where --data has none
    tokens: int = 8192  # of each kind, at most one sample more
    records: int = 100_000  # looked at for them, at most
    batch_tokens: int = 8192  # in one forward pass
    bound: float = 0.01  # relative, on text loss and text entropy
    steps: int = 150  # gradient steps on each gate
    lr: float = 3e-3
    hold: float = 100.0  # weight of the term that holds text
    seed: int = 0  # which samples
    device: str = "cpu"  # cuda, npu, mps
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the forward passes and of what is saved


def calibrate_model(options: CalibrateOptions) -> None:
    """Load, collect samples of both kinds, calibrate, save; says what moved."""
    # A model with experts, in one process.
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("calibration runs as one process: python calibrate.py, without torchrun")
    dtype = getattr(torch, options.dtype)
    model, tokenizer = load_model(options.model, options.device, dtype)
    if not model.config.text.num_experts:
        raise ValueError(f"--model {options.model}: dense; only experts can be calibrated")

    # The probes, as batches.
    batches = []
    for documents in read_probes(options, Encoder(tokenizer, model.config)):
        rows = probe_batches(documents, options.batch_tokens, tokenizer.pad)
        batches.append([batch.to(options.device) for batch in rows])

    # The procedure.
    def design(model: SailVL, text: list[Batch], pictures: list[Batch]) -> Change:
        return by_router(model, text, pictures, options.steps, options.lr, options.hold)

    before = assess(model, *batches)
    share = calibrate(model, *batches, design, options.bound)
    after = assess(model, *batches)

    # What moved.
    most = math.log(model.config.text.num_experts)
    print(f"entropy in nats of {most:.3f}; {share:.3g} of the change keeps text within the bound")
    for name, old, new in (
        ("visual tokens", before.visual_entropy, after.visual_entropy),
        ("text tokens", before.text_entropy, after.text_entropy),
        ("text loss", before.text_loss, after.text_loss),
    ):
        change = 100 * (new / max(old, 1e-9) - 1)  # a router that uses one expert has none
        print(f"  {name:14} {old:.3f} -> {new:.3f} ({change:+.2f} %)")

    # A model like any other: only its gates differ.
    if not share:
        print(f"NOTHING CHANGED: no part of the change keeps text within --bound {options.bound}")
    model.save_pretrained(options.out)
    tokenizer.save(options.out)
    print(f"model in {options.out}")


def read_probes(
    options: CalibrateOptions, encoder: Encoder
) -> tuple[list[Document], list[Document]]:
    """Text-only documents and documents with pictures; says how many, and what could not be used.

    Raises ValueError when a kind is missing, with the way out.
    """
    if options.images and not options.data:
        raise ValueError("--images is the folder of --data, which is missing")
    faults = Faults()

    # Both kinds from --data, or the text-only ones from --text.
    wanted = {"text": options.tokens, "pictures": options.tokens}
    found = {}
    if options.text:
        records = read_records(options.text, None, options, faults)
        found |= collect(records, encoder, faults, {"text": wanted.pop("text")})
    records = read_records(options.data, options.images, options, faults)
    found |= collect(records, encoder, faults, wanted)

    # What was found, what could not be used, what is missing.
    for kind, documents in found.items():
        print(f"{kind}: {len(documents)} samples, {sum(map(len, documents)):,} tokens")
    if faults.counts:
        print(faults.report())
    looked = f"in {options.records:,} records at most"
    if not found["pictures"]:
        raise ValueError(f"--data {options.data}: no usable sample with a picture {looked}")
    if not found["text"]:
        source = f"--text {options.text}" if options.text else f"--data {options.data}"
        raise ValueError(
            f"{source}: no usable sample without a picture {looked}; text behaviour must be kept, "
            "so give text-only samples with --text FILE"
        )
    return found["text"], found["pictures"]


def read_records(
    path: Path | None, images: Path | None, options: CalibrateOptions, faults: Faults
) -> Iterator[Sample | BadSample]:
    """The records of a file in random order, each once; without a file, the drawn world's."""
    if path is None:
        mixture = dict.fromkeys(FAMILIES, 1.0) | {"text": 0.5}
        stream = World().stream(mixture, options.seed)
        yield from (stream[n] for n in range(options.records))
        return

    folder = Folder(path, images)
    faults.counts.update(folder.faults.counts)
    faults.examples.update(folder.faults.examples)
    order = torch.randperm(len(folder), generator=torch.Generator().manual_seed(options.seed))
    for record in order[: options.records].tolist():
        yield folder[record]


if __name__ == "__main__":
    command(calibrate_model)
