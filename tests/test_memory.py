"""infra/memory.py: its formulas against what autograd really saves, and the paper's stages on 8 x 80 GB."""

import re
import weakref
from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import pretrain
import rl
import sft
from attention import Segments, attend_inside
from data.world import World
from infra import memory
from infra.memory import MicroBatch, stage_memory
from infra.plan import memory_line
from llm import rotary_table
from moe import Decisions
from objective import supervised
from packing import Batch
from recipe import Setup
from stage import RLStage, Stage
from train import prepare_blocks
from vlm import PRESETS, SailVL

S = 320  # no width of the toy's: a tensor's shape says whether it is a weight
PAPER = pretrain.PAPER | sft.PAPER | rl.PAPER


def saved_bytes(model: torch.nn.Module, forward, half: bool) -> tuple[int, int]:
    """Bytes that autograd keeps of a forward pass: activations, and bf16 copies of weights.

    Every storage counts once, and the model's own parameters not at all.
    """
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = {tuple(p.shape) for p in model.parameters() if p.ndim >= 2}
    offered: list[weakref.ref] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        offered.append(weakref.ref(tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            result = forward()
    assert result.requires_grad

    # What nothing holds any more was not kept: a block made again without a gradient lets its input go
    kept: dict[int, torch.Tensor] = {}
    for reference in offered:
        tensor = reference()
        if tensor is not None:
            kept[tensor.untyped_storage().data_ptr()] = tensor

    activations = 0
    weights = 0
    for place, tensor in kept.items():
        both_ways = {tuple(tensor.shape), tuple(tensor.mT.shape)} if tensor.ndim >= 2 else set()
        if place in own:
            continue
        if tensor.dtype == torch.bfloat16 and both_ways & shapes:
            weights += tensor.untyped_storage().nbytes()
        else:
            activations += tensor.untyped_storage().nbytes()
    return activations, weights


@pytest.fixture(params=["toy", "toy-moe"])
def either(request) -> SailVL:
    return SailVL(PRESETS[request.param]).init_weights()


@pytest.mark.parametrize("half", [True, False])
def test_a_decoder_block_keeps_what_the_formula_says(either, half):
    model = either
    text = model.config.text
    segments = Segments.of([S // 2] * 2)  # equal: one call of attention, as on an accelerator
    x = torch.randn(S, text.hidden_size, requires_grad=True)
    rope = rotary_table(segments.positions(), text.head_dim, text.rope_theta, x.dtype)
    block = model.language_model.model.layers[0]
    attend = attend_inside(segments, causal=True)

    activations, _ = saved_bytes(model, lambda: block(x * 1.0, rope, attend, 0, Decisions()), half)
    tables = 2 * rope[0].nbytes  # of all blocks together
    formula = memory.decoder_block_bytes(text, S, S, half)
    assert formula == pytest.approx(activations - tables, rel=0.1)


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("position", ["table", "rope2d"])
def test_a_vision_block_keeps_what_the_formula_says(half, position):
    vision = replace(PRESETS["toy"].vision, position=position)
    model = SailVL(replace(PRESETS["toy"], vision=vision)).init_weights()
    grids = [(4, 4)] * (S // 16)
    x = torch.randn(S, vision.hidden_size, requires_grad=True)
    rope = model.vision_model.rope(grids, x)
    attend = attend_inside(Segments.of([16] * len(grids)), causal=False)
    block = model.vision_model.trunk.blocks[0]

    activations, _ = saved_bytes(model, lambda: block(x * 1.0, rope, attend, 0), half)
    tables = 2 * rope[0].nbytes if rope else 0
    formula = memory.vision_block_bytes(vision, S, half)
    assert formula == pytest.approx(activations - tables, rel=0.1)


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize(
    "trains",
    [parts.split() for parts in ("vision adapter llm", "vision adapter", "adapter", "llm")],
)
def test_a_whole_step_keeps_what_the_formula_says(either, recompute, half, trains):
    model = either
    stage = Stage("any", tuple(trains), recompute=recompute)
    images = 10
    batch = packed_batch(model, images)
    prepare_blocks(model, stage)
    for part in memory.PARTS:
        getattr(model, memory.PARTS[part]).requires_grad_(part in trains)

    def forward() -> torch.Tensor:
        return supervised(model, batch, stage)[0]

    labels = int((batch.labels >= 0).sum())
    sizes = MicroBatch(tokens=S, keys=S, patches=16 * images, labels=labels)
    activations, weights = saved_bytes(model, forward, half)
    if recompute:  # in the arguments of every block, where no hook sees them
        activations += 2 * 4 * S * model.config.text.head_dim
    softmax = labels * model.config.text.vocab_size * 4  # few labels: one chunk, part of `logits`
    formula = memory.activation_bytes(model, stage, sizes, half)
    assert formula + softmax == pytest.approx(activations, rel=0.1)

    # Copies of weights that outlive the forward pass are no more than are counted
    if half and not recompute:
        assert memory.half_weight_bytes(model, stage) == pytest.approx(weights, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [True, False])
def test_a_step_never_holds_more_than_is_counted(recompute):
    toy = PRESETS["toy"]
    text = replace(toy.text, hidden_size=256, intermediate_size=768, num_hidden_layers=8)
    model = SailVL(replace(toy, text=text)).init_weights()
    stage = Stage("any", recompute=recompute)
    batch = packed_batch(model, images=10)
    prepare_blocks(model, stage)

    def forward_and_backward() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = supervised(model, batch, stage)
        loss.backward()

    # Gradients are there from the first time on, and are counted elsewhere
    forward_and_backward()
    peak = peak_bytes(forward_and_backward)

    labels = int((batch.labels >= 0).sum())
    sizes = MicroBatch(tokens=S, keys=S, patches=160, labels=labels)
    copies = memory.half_weight_bytes(model, stage)
    forward = copies + memory.logits_bytes(model, stage, labels)
    backward = memory.block_bytes(model, stage, sizes) + (0 if recompute else copies)
    counted = memory.activation_bytes(model, stage, sizes) + max(forward, backward)
    assert peak < counted < 2 * peak


def peak_bytes(work) -> int:
    """The most that a call allocates at once on the CPU, by the profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(accumulate(amount for _, amount in changes))


def packed_batch(model: SailVL, images: int) -> Batch:
    """Two documents of one length; a visual token stands where the first ids are."""
    side = model.config.vision.image_size
    image_token = 7
    model.image_token_id = image_token
    ids = torch.full((1, S), 5)
    ids[0, : 4 * images] = image_token
    labels = ids.clone()
    labels[0, : S // 2] = -1
    segments = Segments.of([S // 2] * 2)
    return Batch(
        ids=ids,
        labels=labels,
        weights=torch.ones(1, S),
        positions=segments.positions()[None],
        segments=segments,
        images=torch.randn(images, 3, side, side),
        owners=["a", "b"],
    )


# ------------------------------------------------------------------------------ the micro-batch


def test_the_largest_micro_batch_is_that_of_the_stage():
    stage = Stage(rows=32, length=512)
    assert memory.largest_micro_batch(stage, 8).tokens == 4 * 512
    assert memory.largest_micro_batch(replace(stage, accumulate=0), 8).tokens == 512
    assert memory.largest_micro_batch(replace(stage, accumulate=2), 8).tokens == 2 * 512

    # 4 prompts x 8 answers, two updates, two ranks: a group each, its prompt once
    rollouts = RLStage(prompts=4, group=8, updates=2, max_prompt=100, max_new=10)
    batch = memory.largest_micro_batch(rollouts, 2)
    assert batch.tokens == 100 + 8 * 10
    assert batch.keys == 100 + 8 * 110
    assert batch.labels == 8 * 10
    assert batch.patches == 4 * 100


def test_the_cache_is_what_generation_allocates():
    from generate import Cache

    model = SailVL(PRESETS["toy"])
    stage = RLStage(prompts=2, group=3, batch=2, max_prompt=20, max_new=12)
    llm = model.language_model
    cache = Cache(llm, [20] * 6, 12, llm.lm_head.weight)
    rows = cache.k.nbytes + cache.v.nbytes
    peak = memory.cache_bytes(model.config.text, stage, 1, half=False)
    assert peak == rows + rows // 3  # beside the rows of the two prompts


# --------------------------------------------------------------------------- the paper's stages


@pytest.mark.parametrize("name", PAPER)
def test_every_stage_of_the_paper_fits_eight_gpus_of_80_gb(name):
    assert stage_memory("SAIL-VL2-2B", PAPER[name])["total"] < 80e9


def test_what_trains_less_takes_less_and_what_is_kept_for_ever_is_counted():
    sft1 = sft.PAPER["sft1"]
    whole = stage_memory("SAIL-VL2-2B", sft1)
    parameters = sum(p.numel() for p in memory.meta_model("SAIL-VL2-2B").parameters())
    assert whole["weights"] == whole["gradients"] == whole["step"] == 4 * parameters
    assert whole["moments"] == 8 * parameters

    adapter = stage_memory("SAIL-VL2-2B", replace(sft1, trains=("adapter",)))
    assert adapter["total"] < whole["total"] / 3
    alone = stage_memory("SAIL-VL2-2B", sft1, ranks=1)
    assert alone["step"] == 0  # nothing is summed
    kept = stage_memory("SAIL-VL2-2B", replace(sft1, recompute=False))
    assert kept["total"] > 80e9  # what recompute is for
    leash = stage_memory("SAIL-VL2-2B", replace(rl.PAPER["verifiable"], kl=0.1))
    assert leash["reference"] == 4 * parameters


def test_an_unknown_preset_is_named():
    with pytest.raises(ValueError, match="--preset nothing: choose from toy"):
        stage_memory("nothing", sft.PAPER["sft1"])


# ------------------------------------------------------------------------------------- the plan


def test_the_plan_says_what_a_rank_holds_by_kind(model, encoder):
    setup = Setup(model, encoder, World())
    parameters = sum(p.numel() for p in model.parameters())
    supervised_line = memory_line(setup, Stage("x", rows=4))
    assert f"{parameters / 1e6:.2f} of {parameters / 1e6:.2f} M parameters train" in supervised_line
    assert "activations" in supervised_line and "logits" in supervised_line
    assert "kv" not in supervised_line

    # Prompts as long as those of the data, not as long as the stage would allow
    line = memory_line(setup, RLStage("x", max_prompt=16384))
    short = memory.model_memory(model, RLStage("x", max_prompt=300), 1, half=False)
    assert "kv" in line
    largest = float(re.search(r"at most ([\d.,]+) MiB", line)[1].replace(",", ""))
    assert largest * 2**20 < 2 * short["total"]
