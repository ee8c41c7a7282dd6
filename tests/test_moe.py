"""Mixture of experts: the fast path is the definition, routing, balance, upcycling, names on disk."""

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import answers
from safetensors.torch import load_file, save_file

from data import world
from data.encode import Encoder
from infra import weights
from kernels.bench import autograd_grouped, saved_bytes
from moe import (
    Decisions,
    MoE,
    Routing,
    balance_loss,
    choose_path,
    entropy,
    expert_load,
    expert_mixture,
    expert_mixture_grouped,
    route,
    tokens_per_expert,
    update_expert_bias,
    z_loss,
)
from packing import collate
from recipe import THINK, upcycled
from scale import parallel
from tokenizer import Tokenizer, train_bpe
from vlm import PRESETS, SailVL

# tokens S, experts E, experts per token K, model width C, expert width I
SIZES = [
    (1, 4, 2, 16, 16),
    (7, 4, 1, 16, 32),
    (33, 8, 2, 32, 16),
    (64, 8, 4, 16, 48),
    (20, 4, 4, 16, 16),
]


def ingredients(S, E, K, C, I, which="random", dtype=torch.float32):
    """Tokens, a decision, experts.

    Chosen are: random experts, the same for all tokens, or only the first half.
    """
    generator = torch.Generator().manual_seed(S)
    x, gate_up, down = (
        torch.randn(*shape, generator=generator, dtype=dtype)
        .div_(shape[-1] ** 0.5)
        .requires_grad_()
        for shape in ((S, C), (E, 2 * I, C), (E, C, I))
    )
    logits = torch.randn(S, E, generator=generator)
    if which == "same":
        logits[:] = torch.arange(E)
    elif which == "half":
        logits[:, max(K, E // 2) :] = -torch.inf
    r = route(logits, K, normalise=K > 1)
    return x, r.indices, r.weights.to(dtype).requires_grad_(), gate_up, down


def with_gradients(mixture, inputs):
    """Output, then the gradients of tokens, weights, gates and ups, downs under a fixed random direction."""
    y = mixture(*inputs)
    direction = torch.randn(
        y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64
    ).to(y.dtype)
    return y, *torch.autograd.grad((y * direction).sum(), [t for t in inputs if t.requires_grad])


@pytest.fixture
def moe_model(config) -> SailVL:
    text = replace(config.text, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64)
    return SailVL(replace(config, text=text)).init_weights(0)


def batch_of(documents, tokenizer):
    return collate([documents[:3], documents[3:5]], None, tokenizer.pad)


# ------------------------------------------------------------------------------------------ mixture


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("which", ["random", "same", "half"])
def test_the_grouped_mixture_is_the_reference_in_output_and_every_gradient(sizes, which):
    inputs = ingredients(*sizes, which)
    slow, fast = (
        with_gradients(expert_mixture, inputs),
        with_gradients(expert_mixture_grouped, inputs),
    )
    assert len(fast) == 5 and all(t.abs().max() > 0 for t in slow)
    for a, b in zip(fast, slow, strict=True):
        assert torch.isfinite(a).all() and (a - b).norm() <= 1e-5 * b.norm()


@pytest.mark.parametrize("mixture", [expert_mixture, expert_mixture_grouped])
def test_a_token_is_the_weighted_sum_of_what_its_experts_say(mixture):
    x, indices, w, gate_up, down = ingredients(33, 8, 2, 32, 16)
    y = mixture(x, indices, w, gate_up, down)
    for t in range(33):
        said = []
        for e in indices[t]:
            gate, up = gate_up[e, :16] @ x[t], gate_up[e, 16:] @ x[t]
            said.append(down[e] @ (gate * gate.sigmoid() * up))
        torch.testing.assert_close(
            y[t], sum(a * b for a, b in zip(w[t], said)), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("mixture", [expert_mixture, expert_mixture_grouped])
def test_an_expert_without_tokens_gets_zero_gradient_and_an_expert_with_tokens_does_not(mixture):
    _, _, _, gate_up, down = with_gradients(
        mixture, ingredients(33, 8, 2, 32, 16, "same")
    )  # experts 6 and 7 get all
    for gradient in (gate_up, down):
        assert [bool(g.any()) for g in gradient] == [False] * 6 + [True] * 2


def test_the_reference_has_the_gradients_of_finite_differences():
    x, indices, w, gate_up, down = ingredients(5, 3, 2, 4, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda *t: expert_mixture(t[0], indices, *t[1:]), (x, w, gate_up, down)
    )


def test_the_grouped_mixture_is_chosen_where_it_can_run_and_only_there():
    def chosen(S, C, I, dtype=torch.float32, K=1):
        shapes = (S, C), (2, 2 * I, C), (2, C, I)
        x, gate_up, down = (torch.zeros(shape, dtype=dtype) for shape in shapes)
        return choose_path(x, torch.zeros(S, K, dtype=torch.long), gate_up, down)

    assert (
        chosen(5, 16, 8) is expert_mixture_grouped
        and chosen(5, 16, 8, torch.bfloat16) is expert_mixture_grouped
    )
    assert chosen(0, 16, 8) is expert_mixture and chosen(5, 16, 8, torch.float64) is expert_mixture
    assert chosen(5, 18, 8) is expert_mixture and chosen(5, 16, 6) is expert_mixture
    assert chosen(5, 16, 4, torch.bfloat16) is expert_mixture  # 8 bytes a row
    assert (
        chosen(1, 16, 8) is expert_mixture and chosen(1, 16, 8, K=2) is expert_mixture_grouped
    )  # decoding


def test_decoding_reads_only_the_experts_that_were_hit():
    x, indices, w, gate_up, down = (t.detach() for t in ingredients(3, 16, 2, 16, 16))
    idle = [e for e in range(16) if e not in indices]
    whole = expert_mixture(x, indices, w, gate_up, down)
    gate_up[idle], down[idle] = torch.nan, torch.nan
    assert len(idle) >= 10 and torch.equal(
        choose_path(x, indices, gate_up, down)(x, indices, w, gate_up, down), whole
    )


@pytest.mark.parametrize("seed", range(6))
def test_random_shapes_and_skews_agree_in_double_precision_and_twice_bit_for_bit(seed):
    g = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=g))

    E, C, I = draw(2, 20), 4 * draw(2, 12), 4 * draw(2, 12)
    inputs = ingredients(draw(1, 200), E, draw(1, E + 1), C, I, ["random", "same"][seed % 2])
    wide = [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in inputs]
    exact = with_gradients(expert_mixture, wide)
    fast, again = (with_gradients(expert_mixture_grouped, inputs) for _ in range(2))
    for a, b, c in zip(fast, again, exact, strict=True):
        assert torch.equal(a, b) and (a - c).norm() <= 1e-5 * c.norm()


def test_half_precision_is_as_near_the_truth_as_autograd_through_grouped_products():
    inputs = ingredients(200, 8, 2, 64, 64)
    half = [t.detach().bfloat16().requires_grad_() if t.is_floating_point() else t for t in inputs]
    half[2] = inputs[2]  # routing weights stay fp32
    exact = with_gradients(
        expert_mixture,
        [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in half],
    )
    peer, fast = (
        with_gradients(autograd_grouped, half),
        with_gradients(expert_mixture_grouped, half),
    )
    for a, b, c in zip(fast, peer, exact, strict=True):
        assert (a - c).norm() <= 1.2 * (b - c).norm() + 1e-4 * c.norm() < 0.02 * c.norm()


def test_the_fast_path_keeps_x_and_z_and_indices_and_nothing_else():
    inputs = ingredients(33, 8, 2, 32, 16)
    kept = saved_bytes(lambda: expert_mixture_grouped(*inputs), [inputs[0], *inputs[2:]])
    slots = 33 * 2
    assert (
        kept == slots * 2 * 16 * 4 + 2 * slots * 8 + 8 * 4
    )  # z; order and inverse; offsets (x is an input, held anyway)


def scattered(t: torch.Tensor) -> torch.Tensor:
    """The same values, no two of them next to each other in memory."""
    wide = torch.empty(*t.shape, 2, dtype=t.dtype)
    wide[..., 0] = t.detach()
    return wide[..., 0].requires_grad_(t.is_floating_point())


@pytest.mark.parametrize("mixture", [expert_mixture, expert_mixture_grouped])
@pytest.mark.parametrize("which", [(0,), (1,), (2,), (3,), (4,), (0, 1, 2, 3, 4)], ids=str)
def test_inputs_may_lie_anywhere_in_memory(mixture, which):
    """x, indices, weights, gate_up, down, one by one and all together."""
    inputs = ingredients(33, 8, 2, 32, 16)
    elsewhere = [scattered(t) if i in which else t for i, t in enumerate(inputs)]
    assert not any(elsewhere[i].is_contiguous() for i in which)
    near, far = with_gradients(mixture, inputs), with_gradients(mixture, elsewhere)
    for a, b in zip(far, near, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# What needs a gradient, and the products of a backward pass: W2 once for what lies before it and
# once for itself, W13 likewise.
FROZEN = {
    "x": (0, 2),
    "weights": (2, 1),
    "gate_up": (3, 2),
    "down": (4, 1),
    "x gate_up": ((0, 3), 3),
    "weights down": ((2, 4), 2),
    "x weights gate_up down": ((0, 2, 3, 4), 4),
}


@pytest.mark.parametrize("trains", FROZEN)
def test_the_grouped_mixture_computes_no_gradient_for_what_is_frozen(trains, monkeypatch):
    wanted, products = FROZEN[trains]
    wanted = (wanted,) if isinstance(wanted, int) else wanted
    inputs = ingredients(33, 8, 2, 32, 16)
    whole = dict(zip((0, 2, 3, 4), with_gradients(expert_mixture_grouped, inputs)[1:]))
    frozen = [t.detach() for t in inputs]
    for i in wanted:
        frozen[i].requires_grad_()

    calls = []
    grouped_mm = F.grouped_mm
    monkeypatch.setattr(F, "grouped_mm", lambda *a, **k: calls.append(1) or grouped_mm(*a, **k))
    y = expert_mixture_grouped(*frozen)
    direction = torch.randn(
        y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64
    ).to(y.dtype)
    calls.clear()
    gradients = torch.autograd.grad((y * direction).sum(), [frozen[i] for i in wanted])
    assert len(calls) == products
    for i, gradient in zip(wanted, gradients, strict=True):
        assert torch.equal(gradient, whole[i])


@pytest.mark.parametrize("S, C, I", [(0, 16, 16), (5, 18, 6), (5, 16, 16)])
def test_no_token_and_odd_widths_go_through_all_the_same(S, C, I):
    inputs = ingredients(S, 4, 2, C, I)
    torch.testing.assert_close(
        choose_path(inputs[0], inputs[1], *inputs[3:])(*inputs), expert_mixture(*inputs)
    )


# ------------------------------------------------------------------------------------------ routing


def test_one_expert_per_token_with_renormalised_weights_is_refused():
    with pytest.raises(ValueError, match="num_experts_per_tok=1.*norm_topk_prob"):
        route(torch.zeros(3, 4), 1, normalise=True)
    assert route(torch.zeros(3, 4), 1, normalise=False).weights.tolist() == [[0.25]] * 3


@pytest.mark.parametrize("k", [2, 3, 8])
def test_kept_weights_sum_to_one_in_the_proportions_of_the_softmax(k):
    logits = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    probability = logits.softmax(-1)
    plain, r = route(logits, k, normalise=False), route(logits, k, normalise=True)
    torch.testing.assert_close(plain.weights, probability.gather(1, plain.indices))
    torch.testing.assert_close(r.weights.sum(-1), torch.ones(50))
    torch.testing.assert_close(r.weights / r.weights[:, :1], plain.weights / plain.weights[:, :1])
    left_out = torch.ones_like(probability).scatter(1, r.indices, 0) * probability
    assert (left_out.amax(-1) <= plain.weights.amin(-1)).all()  # nothing better was left out
    assert all(len(set(row)) == k for row in r.indices.tolist())


def test_routing_is_decided_in_single_precision_whatever_the_model():
    logits = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    half, full = route(logits, 2, normalise=True), route(logits.float(), 2, normalise=True)
    assert half.weights.dtype == half.logits.dtype == torch.float32
    assert torch.equal(half.weights, full.weights) and torch.equal(half.indices, full.indices)
    assert route(logits.double(), 2, normalise=True).weights.dtype == torch.float64


def test_a_bias_moves_the_choice_and_never_the_weights():
    logits = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    bias = torch.zeros(8)
    bias[3] = 1.0  # more than any difference of probabilities
    r = route(logits, 2, normalise=False, bias=bias)
    assert (r.indices == 3).any(1).all()
    torch.testing.assert_close(r.weights, logits.softmax(-1).gather(1, r.indices))


# ------------------------------------------------------------------------------------- balance loss


def perfect(E=8, K=2, rounds=3):
    """Token t prefers experts t, t+1, ... around a circle: loads and mean probabilities are all equal."""
    circle = torch.stack([torch.arange(E).roll(t) for t in range(E)]).float()
    return route(circle.repeat(rounds, 1), K, normalise=K > 1)


def stacked(*decisions):
    """The decisions of several sets of tokens as one."""
    return Routing(
        *(
            torch.cat([getattr(r, field) for r in decisions])
            for field in ("logits", "indices", "weights")
        )
    )


@pytest.mark.parametrize("E, K", [(8, 2), (4, 1), (8, 8), (16, 4)])
def test_the_balance_loss_is_k_at_perfect_balance(E, K):
    r = perfect(E, K)
    torch.testing.assert_close(balance_loss([r]), torch.tensor(float(K)))
    torch.testing.assert_close(expert_load(r.indices, E), torch.full((E,), 1 / E))


def test_the_balance_loss_grows_with_the_skew_up_to_e():
    def loss(skew):
        return float(
            balance_loss([route(perfect().logits + skew * torch.arange(8), 2, normalise=True)])
        )

    assert 2 < loss(0.5) < loss(1.5) < loss(5) < 8
    one = route(torch.tensor([[50.0] + [0.0] * 7]).repeat(10, 1), 1, normalise=False)
    torch.testing.assert_close(balance_loss([one]), torch.tensor(8.0))  # everything to one expert


def test_the_balance_loss_takes_the_layers_together():
    skewed = route(torch.arange(8.0).repeat(24, 1), 2, normalise=True)
    mirrored = route(torch.arange(8.0).flip(0).repeat(24, 1), 2, normalise=True)
    both = balance_loss([skewed, mirrored])
    torch.testing.assert_close(both, balance_loss([stacked(skewed, mirrored)]))
    assert both < balance_loss([skewed]) - 1


def test_the_balance_loss_ignores_padding():
    r, padding = perfect(), route(torch.arange(8.0).repeat(100, 1) * 3, 2, normalise=True)
    padded = stacked(r, padding)
    keep = torch.arange(len(padded.logits)) < len(r.logits)
    assert torch.equal(balance_loss([padded], keep), balance_loss([r]))
    assert balance_loss([padded]) > 3


def test_descending_the_balance_loss_takes_probability_from_the_crowded_expert():
    logits = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    logits[:, 2] += 1
    logits.requires_grad_()
    balance_loss([route(logits, 2, normalise=True)]).backward()
    assert [g > 0 for g in logits.grad.sum(0).tolist()] == [False, False, True, False]


# ---------------------------------------------------------------------------------------- the model


@torch.no_grad()
@pytest.mark.parametrize("pieces", [1, 2])
def test_an_upcycled_model_computes_what_the_dense_one_computes(
    model, documents, tokenizer, pieces
):
    batch = batch_of(documents, tokenizer)
    text = replace(
        model.config.text,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=model.config.text.intermediate_size // pieces,
    )
    sparse = model.to_moe(text)
    a, b = (m(batch.ids, batch.images, batch.positions, batch.segments) for m in (model, sparse))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    layers = sparse.language_model.model.layers
    assert all(
        layer.mlp.gate.weight.std() > 0 for layer in layers
    )  # the routers still tell tokens apart
    dense, copy = model.mlp1[1].weight, sparse.mlp1[1].weight
    assert torch.equal(dense, copy) and dense.data_ptr() != copy.data_ptr()


@torch.no_grad()
def test_upcycling_refuses_experts_of_another_width_and_weights_that_do_not_sum_to_one(model):
    width = model.config.text.intermediate_size
    for wrong in (
        {"moe_intermediate_size": width // 4},
        {"moe_intermediate_size": width, "norm_topk_prob": False},
    ):
        with pytest.raises(AssertionError, match="upcycling|whole copies"):
            model.to_moe(replace(model.config.text, num_experts=4, num_experts_per_tok=2, **wrong))
    with pytest.raises(ValueError, match="--expert-pieces 3: must divide --experts 9, 2 experts a"):
        upcycled(model, 9, pieces=3)


def test_the_task_gives_the_router_and_every_expert_a_gradient(moe_model, documents, tokenizer):
    batch, routing = batch_of(documents, tokenizer), Decisions()
    hidden = moe_model.hidden(
        batch.ids, batch.images, batch.positions, batch.segments, routing=routing
    )
    F.cross_entropy(moe_model.language_model.lm_head(hidden), batch.labels.flatten()).backward()
    assert len(routing) == len(moe_model.language_model.model.layers)
    S = batch.ids.numel()
    assert all(
        r.logits.shape == (S, 4) and r.indices.shape == r.weights.shape == (S, 2) for r in routing
    )
    for layer in moe_model.language_model.model.layers:
        assert layer.mlp.gate.weight.grad.norm() > 1e-6
        assert all(g.any() for g in layer.mlp.experts.gate_up_proj.grad) and all(
            g.any() for g in layer.mlp.experts.down_proj.grad
        )


@torch.no_grad()
def test_a_packed_document_is_routed_as_it_is_alone(moe_model, documents, tokenizer):
    moe_model.double()
    batch = batch_of(documents[:2] + documents[5:8], tokenizer)
    together = moe_model(batch.ids, batch.images, batch.positions, batch.segments).flatten(0, 1)
    first = documents[0]
    n, images = len(first), len(first.images)
    alone = moe_model(torch.from_numpy(first.ids)[None], batch.images[:images])
    torch.testing.assert_close(together[:n], alone[0], rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------------------ on disk


def test_a_moe_checkpoint_has_one_name_per_expert_on_disk_and_comes_back_bit_equal(
    moe_model, tmp_path
):
    moe_model.save_pretrained(tmp_path)
    stored, ours = load_file(tmp_path / "model.safetensors"), dict(moe_model.named_parameters())
    assert json.loads((tmp_path / "config.json").read_text())["llm_config"]["num_experts"] == 4
    for i, layer in enumerate(moe_model.language_model.model.layers):
        at = f"language_model.model.layers.{i}.mlp"
        experts = {n for n in stored if n.startswith(f"{at}.experts.")}
        parts = ("gate_proj", "up_proj", "down_proj")
        assert experts == {f"{at}.experts.{e}.{part}.weight" for e in range(4) for part in parts}
        for e in range(4):
            gate, up, down = (stored[f"{at}.experts.{e}.{part}.weight"] for part in parts)
            assert torch.equal(torch.cat([gate, up]), layer.mlp.experts.gate_up_proj[e])
            assert torch.equal(down, layer.mlp.experts.down_proj[e])
        assert torch.equal(stored[f"{at}.gate.weight"], layer.mlp.gate.weight)
    again = SailVL.from_pretrained(tmp_path)
    assert again.config == moe_model.config
    assert all(torch.equal(p, ours[n]) for n, p in again.named_parameters())


def test_a_missing_expert_is_an_error_that_names_it(moe_model, tmp_path):
    moe_model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    name = "language_model.model.layers.1.mlp.experts.2.up_proj.weight"
    del stored[name]
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        SailVL.from_pretrained(tmp_path)


def test_the_30b_a3b_preset_has_the_published_size_and_the_published_expert_shapes():
    with torch.device("meta"):
        model = SailVL(PRESETS["SAIL-VL2-30B-A3B"])
    assert (
        sum(p.numel() for p in model.language_model.parameters()) == 30_532_122_624
    )  # Qwen3-30B-A3B
    stored = weights.tensors(model)
    last = "language_model.model.layers.47.mlp."
    assert stored[last + "experts.127.gate_proj.weight"].shape == (768, 2048)
    assert stored[last + "experts.127.down_proj.weight"].shape == (2048, 768)
    assert stored[last + "gate.weight"].shape == (128, 2048)


# ----------------------------------------------------------- balance over ranks, statistics, biases


def part_of_a_batch(rank: int, size: int, rendezvous: str, out: str) -> None:
    """One process: its share of four packed rows through `objective.supervised`.

    Rank 0 saves loss, balance and router gradients.
    """
    if size > 1:
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size
        )
    tok = Tokenizer(train_bpe(world.corpus(200), 400), "", THINK)
    c = PRESETS["toy-moe"]
    text = replace(c.text, vocab_size=448, num_hidden_layers=2, num_experts=4)
    model = SailVL(
        replace(
            c, text=text, vision=replace(c.vision, num_hidden_layers=1), image_token_id=tok.image
        )
    ).init_weights(0)
    encode = Encoder(tok, model.config, max_length=512)
    rows = [
        [encode(world.sample(i, 0, {"text": 1.0} if i < 2 else {"caption": 1.0}))] for i in range(4)
    ]
    mine = rows[
        rank * 4 // size : (rank + 1) * 4 // size
    ]  # 2 ranks: text to one, pictures to the other
    batch = collate(mine, None, tok.pad)
    loss, stats = answers(model, batch, balance=100.0)  # far above the task's gradient
    weight, balance = parallel.total(batch.weight, stats["balance"])
    (loss / weight).backward()
    gates = [block.mlp.gate.weight for block in model.language_model.model.layers]
    parallel.sum_gradients(gates)
    (loss,) = parallel.total(float(loss))
    if rank == 0:
        torch.save([torch.tensor([loss / weight, balance / weight])] + [g.grad for g in gates], out)
    parallel.stop()


@pytest.mark.slow
def test_ranks_balance_the_global_batch(tmp_path):
    outs = []
    for size in (1, 2, 4):
        outs.append(tmp_path / f"{size}.pt")
        arguments = size, str(tmp_path / f"meet{size}"), str(outs[-1])
        torch.multiprocessing.spawn(
            part_of_a_batch, arguments, nprocs=size
        ) if size > 1 else part_of_a_batch(0, *arguments)
    one, *more = (torch.load(out) for out in outs)
    assert all(g.norm() > 0 for g in one)
    for several in more:
        for a, b in zip(several, one, strict=True):
            assert (a - b).norm() <= 1e-5 * b.norm()


def test_a_rank_alone_would_balance_something_else():
    """The parts of the global loss add up to it; the mean of local losses is another, larger number."""
    text = route(torch.arange(8.0).repeat(24, 1), 2, normalise=True)
    pictures = route(torch.arange(8.0).flip(0).repeat(24, 1), 2, normalise=True)
    counts, whole = (
        (tokens_per_expert([text]) + tokens_per_expert([pictures])).sum(0),
        balance_loss([stacked(text, pictures)]),
    )
    parts = [balance_loss([r], everyone=(counts, 48.0)) for r in (text, pictures)]
    torch.testing.assert_close(sum(parts), whole)
    assert (balance_loss([text]) + balance_loss([pictures])) / 2 > whole + 1


def test_entropy_is_in_nats_and_counts_are_complete():
    torch.testing.assert_close(
        entropy(torch.tensor([[5.0, 5, 5, 5], [9, 0, 0, 0], [3, 3, 0, 0]])),
        torch.tensor([4.0, 1, 2]).log(),
    )
    r = perfect(8, 2, 3)
    keep = torch.arange(24) < 10
    assert (
        tokens_per_expert([r, r], keep).sum(1).tolist() == [20, 20]
        and tokens_per_expert([r]).sum() == 48
    )  # none dropped


def test_the_z_loss_is_the_mean_square_of_the_log_partition():
    r = route(torch.tensor([[0.0, 0], [3, 3]]), 1, normalise=False)
    torch.testing.assert_close(
        z_loss([r]), torch.tensor([2.0, 2 * math.e**3]).log().square().mean()
    )


def test_the_expert_bias_spreads_a_crowd():
    config = replace(PRESETS["toy-moe"].text, hidden_size=16, moe_intermediate_size=16)
    layer = MoE(config)
    torch.nn.init.normal_(layer.gate.weight, std=0.25, generator=torch.Generator().manual_seed(0))
    torch.nn.init.zeros_(layer.experts.gate_up_proj), torch.nn.init.zeros_(layer.experts.down_proj)
    x, spread = torch.randn(500, 16, generator=torch.Generator().manual_seed(1)) + 1, []
    for _ in range(100):
        layer(x, routing := Decisions())
        spread.append(float(entropy(tokens_per_expert(routing))))
        update_expert_bias([layer], tokens_per_expert(routing), 0.01)
    assert spread[0] < 1.9 and spread[-1] > 0.99 * math.log(8)
