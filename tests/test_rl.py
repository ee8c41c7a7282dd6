"""RL: identities of the losses, TRL's losses on the same tensors, rollouts that score as sampled,
resume and ranks that change nothing."""

import itertools
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from safetensors.torch import load_file

import moe
import rl
import rollout
from claims import algorithms
from data import world
from data.sample import BadSample, Faults
from data.stream import Drawn
from objective import policy, sampled_logprobs
from policy_losses import (
    AGGREGATIONS,
    ALGORITHMS,
    aggregate,
    centred,
    divisor,
    group_advantage,
    kl_penalty,
    leave_one_out,
    loss,
    overlong_penalty,
    sequence_log_ratio,
)
from recipe import Setup, fit, resolved
from rollout import oddities
from scale.parallel import Ranks
from stage import RLStage
from vlm import PRESETS, SailVL

EVERY_ALGORITHM = pytest.mark.parametrize("name", list(ALGORITHMS))


def tensors(N=4, L=5, spread=0.0, seed=0):
    """logp (a leaf), old, mask with lengths 5, 3, 1, 4, advantages of both signs; float64."""
    g = torch.Generator().manual_seed(seed)
    logp = -torch.rand(N, L, generator=g, dtype=torch.double)
    old = logp + spread * torch.randn(N, L, generator=g, dtype=torch.double)
    mask = (torch.arange(L) < torch.tensor([5, 3, 1, 4])[:N, None]).double()
    return (
        logp.requires_grad_(),
        old,
        mask,
        torch.tensor([1.0, -0.5, 2.0, -1.0], dtype=torch.double)[:N],
    )


# ----------------------------------------------------------------------------------- identities


@EVERY_ALGORITHM
def test_on_the_first_minibatch_the_gradient_is_reinforce(name):
    logp, _, mask, A = tensors()
    total, cut = loss(name, logp, logp.detach(), mask, A)
    total.backward()
    per = mask.sum(1, keepdim=True) if ALGORITHMS[name].aggregation == "sequences" else 1
    torch.testing.assert_close(logp.grad, -A[:, None] * mask / per)
    assert cut == 0


@pytest.mark.parametrize(
    "A,ratio,slope,cispo",
    [
        (1, 0.5, 0.5, 0.8),
        (1, 0.9, 0.9, 0.9),
        (1, 1.1, 1.1, 1.1),
        (1, 1.5, 0, 1.28),
        (-1, 0.5, 0, -0.8),
        (-1, 0.9, -0.9, -0.9),
        (-1, 1.1, -1.1, -1.1),
        (-1, 1.5, -1.5, -1.28),
    ],
)
def test_the_clip_gates(A, ratio, slope, cispo):
    """d gain / d log p for a single token: PPO's four open and two shut gates, and CISPO, which
    bounds but never shuts."""
    for name in ("dapo", "gspo", "gspo_token", "dual", "cispo"):
        old = torch.tensor([[-1.0]], dtype=torch.double)
        logp = (old + math.log(ratio)).requires_grad_()
        total, cut = loss(name, logp, old, torch.ones(1, 1), torch.tensor([float(A)]), 0.2, 0.28)
        total.backward()
        want = cispo if name == "cispo" else slope
        assert -logp.grad.item() == pytest.approx(want)
        assert bool(cut) == (not 0.8 <= ratio <= 1.28 if name == "cispo" else slope == 0)


def test_dual_clip_bounds_what_a_bad_token_can_do():
    for name, slope, value in (("ppo", -5.0, 5.0), ("dual", 0.0, 3.0)):
        old = torch.tensor([[-4.0]], dtype=torch.double)
        logp = (old + math.log(5.0)).requires_grad_()
        total, _ = loss(name, logp, old, torch.ones(1, 1), torch.tensor([-1.0]))
        total.backward()
        assert -logp.grad.item() == pytest.approx(slope) and total.item() == pytest.approx(value)


def test_gspo_token_is_gspo_when_a_completions_tokens_share_their_advantage():
    results = []
    for name in ("gspo", "gspo_token"):
        logp, old, mask, A = tensors(spread=0.1)
        total, cut = loss(name, logp, old, mask, A, 0.01, 0.05)
        total.backward()
        results.append((total.detach(), logp.grad, cut))
    assert 0 < results[0][2] < 1  # some are clipped, not all
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


def test_a_sequence_is_clipped_as_one():
    logp, old, mask, A = tensors(spread=0.5)
    loss("gspo", logp, old, mask, A)[0].backward()
    dead = [bool((g[m > 0] == 0).all()) for g, m in zip(logp.grad, mask)]
    assert (
        any(dead)
        and not all(dead)
        and all(d or bool((g[m > 0] != 0).all()) for d, g, m in zip(dead, logp.grad, mask))
    )


@EVERY_ALGORITHM
@pytest.mark.parametrize("filler", [(9.0, -9.0), (-math.inf, -math.inf), (math.nan, 0.0)])
def test_padding_changes_nothing_whatever_stands_there(name, filler):
    logp, old, mask, A = tensors(spread=0.1)
    whole = loss(name, logp, old, mask, A)
    whole[0].backward()
    wide = [
        torch.cat([t.detach(), torch.full((4, 3), v, dtype=torch.double)], 1)
        for t, v in ((logp, filler[0]), (old, filler[1]), (mask, 0.0))
    ]
    wide[0].requires_grad_()
    padded = loss(name, *wide, A)
    padded[0].backward()
    torch.testing.assert_close(padded, whole)
    assert (wide[0].grad[:, 5:] == 0).all()
    torch.testing.assert_close(wide[0].grad[:, :5], logp.grad)
    assert (logp.grad[mask == 0] == 0).all()


@EVERY_ALGORITHM
def test_micro_batches_of_any_lengths_add_up_to_the_batch(name):
    logp, old, mask, A = tensors(spread=0.1)
    how = ALGORITHMS[name].aggregation
    whole = loss(name, logp, old, mask, A)[0] / divisor(mask, how, 64)
    parts = [slice(0, 1), slice(1, 4)]
    total = sum(divisor(mask[s], how, 64) for s in parts)
    torch.testing.assert_close(
        sum(loss(name, logp[s], old[s], mask[s], A[s])[0] for s in parts) / total, whole
    )


def test_what_the_aggregations_weigh():
    """Two completions of 4 and 1 tokens, every token worth 1."""
    mask = torch.tensor([[1.0, 1, 1, 1], [1, 0, 0, 0]])
    value = {
        how: float(aggregate(torch.ones(2, 4), mask, how)) / divisor(mask, how, 10)
        for how in AGGREGATIONS
    }
    assert value == {
        "tokens": 1.0,
        "sequences": 1.0,
        "budget": pytest.approx(5 / 20),
        "completions": 2.5,
    }
    first = {
        how: float(aggregate(torch.tensor([[1.0], [0.0]]).expand(2, 4), mask, how))
        / divisor(mask, how, 10)
        for how in AGGREGATIONS
    }
    assert first == {
        "tokens": 0.8,
        "sequences": 0.5,
        "budget": pytest.approx(0.2),
        "completions": 2.0,
    }


# ----------------------------------------------------------------------------------- advantages


@pytest.mark.parametrize("estimator", [group_advantage, centred, leave_one_out])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_group_that_agrees_is_exactly_zero(estimator, dtype):
    for value in (0.7, 0.1, 1 / 3, 1e8):
        assert (estimator(torch.full((12,), value, dtype=dtype), 6) == 0).all()


def test_advantages_of_one_right_answer_in_eight():
    reward = torch.tensor([1.0] + [0.0] * 7)
    assert group_advantage(reward, 8)[0] == pytest.approx(2.646, abs=1e-3)
    assert (
        centred(reward, 8)[0] == 0.875
        and leave_one_out(reward, 8)[0] == 1.0
        and leave_one_out(reward, 8)[1] == pytest.approx(-1 / 7)
    )
    torch.testing.assert_close(group_advantage(reward + 5, 8), group_advantage(reward, 8))
    with pytest.raises(ValueError, match="at least two"):
        leave_one_out(reward, 1)


def test_leave_one_out_is_unbiased_and_the_group_mean_shrinks_the_gradient():
    """Every tuple of G samples of a three-armed bandit, weighed by its probability."""
    G, logits, payoff = (
        3,
        torch.tensor([0.3, -0.2, 0.9], dtype=torch.double, requires_grad=True),
        torch.tensor([1.0, 0.0, 2.0], dtype=torch.double),
    )
    p = logits.softmax(0)
    (true,) = torch.autograd.grad((p * payoff).sum(), logits)
    for estimator, scale in ((leave_one_out, 1.0), (centred, (G - 1) / G)):
        total = torch.zeros(3, dtype=torch.double)
        for arms in itertools.product(range(3), repeat=G):
            arms = torch.tensor(arms)
            logp = logits.log_softmax(0)[arms][:, None]
            gain = (
                -loss(
                    "reinforce", logp, logp.detach(), torch.ones(G, 1), estimator(payoff[arms], G)
                )[0]
                / G
            )
            total += p.detach()[arms].prod() * torch.autograd.grad(gain, logits)[0]
        torch.testing.assert_close(total, scale * true)


def test_overlong_answers_are_punished_softly():
    assert [overlong_penalty(n, 20, 5) for n in (1, 15, 16, 18, 20, 25)] == [
        0,
        0,
        -0.2,
        -0.6,
        -1,
        -1,
    ]
    assert overlong_penalty(20, 20, 0) == 0


# ------------------------------------------------------------------------------------------- KL


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_estimators_as_value_and_as_loss(estimator):
    """By enumeration over a vocabulary of four: k1 and k3 are unbiased values; as losses k1 pulls
    nowhere, k2 along
    KL(pi || ref), k3 along KL(ref || pi)."""
    logits = torch.tensor([0.5, -1.0, 0.2, 0.9], dtype=torch.double, requires_grad=True)
    reference = torch.tensor([0.1, 0.4, -0.6, 0.3], dtype=torch.double).log_softmax(0)
    logp = logits.log_softmax(0)
    p = logp.exp()
    reverse, forward = (p * (logp - reference)).sum(), (reference.exp() * (reference - logp)).sum()
    values = kl_penalty(logp[:, None], reference[:, None], torch.ones(4, 1), estimator)[:, 0]
    expected = (p.detach() * values).sum()
    if estimator != "k2":
        assert expected.item() == pytest.approx(reverse.item())
    want = {
        "k1": torch.zeros(4, dtype=torch.double),
        "k2": torch.autograd.grad(reverse, logits, retain_graph=True)[0],
        "k3": torch.autograd.grad(forward, logits, retain_graph=True)[0],
    }[estimator]
    torch.testing.assert_close(
        torch.autograd.grad(expected, logits)[0], want, atol=1e-12, rtol=1e-9
    )


# --------------------------------------------------------------------- an independent reference


def written_from_the_papers(name, logp, old, mask, A, budget):
    """Loops over completions and tokens, as the formulas stand in the papers; no code shared with
    policy_losses."""
    objective, tokens = 0.0, float(mask.sum())
    for i in range(len(A)):
        n = int(mask[i].sum())
        r = [torch.exp(logp[i, t] - old[i, t]) for t in range(n)]

        def clip(x, lo, hi):
            return torch.clamp(x, lo, hi)

        def surrogate(x, lo, hi):
            return torch.min(x * A[i], clip(x, lo, hi) * A[i])

        if name == "grpo":
            objective += sum(surrogate(x, 0.8, 1.2) for x in r) / n / len(A)
        elif name == "dr_grpo":
            objective += sum(surrogate(x, 0.8, 1.2) for x in r) / (len(A) * budget)
        elif name == "ppo":
            objective += sum(surrogate(x, 0.8, 1.2) for x in r) / tokens
        elif name == "dual":
            objective += (
                sum(
                    torch.max(surrogate(x, 0.8, 1.2), 3 * A[i])
                    if A[i] < 0
                    else surrogate(x, 0.8, 1.2)
                    for x in r
                )
                / tokens
            )
        elif name == "dapo":
            objective += sum(surrogate(x, 0.8, 1.28) for x in r) / tokens
        elif name == "gspo":
            s = torch.exp(sum(logp[i, t] - old[i, t] for t in range(n)) / n)
            objective += surrogate(s, 1 - 3e-4, 1 + 4e-4) / len(A)
        elif name == "gspo_token":
            s = torch.exp(sum(logp[i, t] - old[i, t] for t in range(n)) / n).detach()
            objective += (
                sum(
                    surrogate(
                        s * torch.exp(logp[i, t]) / torch.exp(logp[i, t]).detach(),
                        1 - 3e-4,
                        1 + 4e-4,
                    )
                    for t in range(n)
                )
                / n
                / len(A)
            )
        elif name == "cispo":
            objective += (
                sum(clip(x, 0, 5).detach() * A[i] * logp[i, t] for t, x in enumerate(r)) / tokens
            )
        elif name == "reinforce":
            objective += A[i] * sum(logp[i, t] for t in range(n)) / len(A)
    return -objective


@EVERY_ALGORITHM
def test_every_loss_is_its_papers_formula(name):
    for seed in range(5):
        logp, old, mask, A = tensors(spread=0.8, seed=seed)
        ours = loss(name, logp, old, mask, A)[0] / divisor(mask, ALGORITHMS[name].aggregation, 64)
        (gradient,) = torch.autograd.grad(ours, logp)
        theirs = written_from_the_papers(name, logp, old, mask, A, 64)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(gradient, torch.autograd.grad(theirs, logp)[0])


def trl_loss(
    logp,
    old,
    mask,
    A,
    loss_type,
    level="token",
    low=0.2,
    high=0.2,
    delta=None,
    beta=0.0,
    reference=None,
    budget=64,
):
    """TRL's own GRPOTrainer._compute_loss, called without a trainer: it reads these attributes and
    no others."""
    trainer = pytest.importorskip("trl.trainer.grpo_trainer").GRPOTrainer
    same = SimpleNamespace(gather=lambda t: t, reduce=lambda t, reduction: t, num_processes=1)
    me = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (logp, torch.zeros_like(logp), None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=level,
        loss_type=loss_type,
        beta=beta,
        epsilon_low=low,
        epsilon_high=high,
        use_vllm=False,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        max_completion_length=budget,
        accelerator=same,
        _entropy_bonus_enabled=False,
        args=SimpleNamespace(delta=delta, use_bias_correction_kl=False, steps_per_generation=1),
        _metrics={
            "train": {
                k: []
                for k in (
                    "entropy",
                    "kl",
                    "cispo_clip_ratio",
                    *(
                        f"clip_ratio/{k}"
                        for k in ("low_mean", "high_mean", "region_mean", "low_min", "high_max")
                    ),
                )
            }
        },
    )
    ids = torch.zeros(mask.shape, dtype=torch.long)
    return trainer._compute_loss(
        me,
        None,
        {
            "prompt_ids": ids[:, :1],
            "prompt_mask": ids[:, :1],
            "completion_ids": ids,
            "completion_mask": mask,
            "advantages": A,
            "old_per_token_logps": old,
            "ref_per_token_logps": reference,
            "num_items_in_batch": mask.sum(),
        },
    )


@pytest.mark.parametrize(
    "name,how",
    [
        ("grpo", dict(loss_type="grpo")),
        ("dr_grpo", dict(loss_type="dr_grpo")),
        ("ppo", dict(loss_type="bnpo")),
        ("dapo", dict(loss_type="dapo", high=0.28)),
        ("dual", dict(loss_type="dapo", delta=3.0)),
        ("gspo", dict(loss_type="grpo", level="sequence", low=3e-4, high=4e-4)),
        ("cispo", dict(loss_type="cispo", high=5.0)),
    ],
)
def test_values_and_gradients_are_those_of_trl(name, how):
    for seed in range(5):
        logp, old, mask, A = tensors(spread=0.8, seed=seed)
        ours = loss(name, logp, old, mask, A)[0] / divisor(mask, ALGORITHMS[name].aggregation, 64)
        theirs = trl_loss(logp, old, mask, A, **how)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(
            torch.autograd.grad(ours, logp)[0], torch.autograd.grad(theirs, logp)[0]
        )


def test_the_kl_penalty_is_trls():
    logp, old, mask, A = tensors(spread=0.3)
    reference = tensors(seed=7)[0].detach()
    ours = (
        loss("grpo", logp, old, mask, A)[0]
        + 0.04 * aggregate(kl_penalty(logp, reference, mask), mask, "sequences")
    ) / 4
    theirs = trl_loss(logp, old, mask, A, "grpo", beta=0.04, reference=reference)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        torch.autograd.grad(ours, logp)[0], torch.autograd.grad(theirs, logp)[0]
    )


# -------------------------------------------------------------------------------------- choices


@pytest.mark.parametrize(
    "odd,words",
    [
        (dict(algorithm="gspo", low=0.2, high=0.28), "never clips"),
        (dict(algorithm="gspo", aggregation="tokens"), "weighs each completion"),
        (dict(algorithm="dapo", low=3e-4, high=4e-4), "loses nearly every token"),
        (dict(algorithm="reinforce", updates=2), "off-policy"),
        (dict(kl=0.1, estimator="k1"), "expected gradient of zero"),
        (dict(replay=True), "no experts"),
        (dict(algorithm="gspo", replay=True), "not needed"),
    ],
)
def test_choices_that_make_no_sense_are_warned_about(odd, words):
    assert any(
        words in sentence
        for sentence in oddities(
            RLStage("x", **({"algorithm": "dapo"} | odd)), experts=0 if words == "no experts" else 4
        )
    )


@pytest.mark.parametrize(
    "wrong,words",
    [
        (dict(algorithm="grpo2"), "--algorithm"),
        (dict(group=1), "group of one"),
        (dict(temperature=0.0), "greedy"),
        (dict(overlong=64), "unpunished"),
        (dict(reward="praise"), "--reward"),
        (dict(aggregation="rows"), "--aggregation"),
    ],
)
def test_choices_that_cannot_work_are_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        oddities(RLStage("x", **({"algorithm": "dapo"} | wrong)))


def test_the_recipes_and_every_algorithms_own_choices_are_not_odd(model):
    for stage in [*rl.TOY.values(), *rl.PAPER.values()]:
        assert oddities(resolved(stage, model)) == []
    for name in ALGORITHMS:
        assert oddities(RLStage("x", algorithm=name, updates=1), experts=4) == []
    paper = rl.PAPER["verifiable"]
    assert (
        paper.prompts * paper.group == 2048
        and paper.prompts * paper.group * paper.passes // paper.updates == 512
    )


# ------------------------------------------------------------------------------------- rollouts

SMALL = RLStage(
    "x",
    algorithm="dapo",
    mixture={"counting": 1.0},
    prompts=4,
    group=3,
    updates=2,
    max_new=6,
    overlong=0,
    dynamic=False,
    turns=1,
    seed=5,
)


def noisy(text, sample, finished):
    """A reward that disagrees inside most groups, from the text alone."""
    return {"reward": float(sum(text.encode()) % 2)}


def make(model, encoder, stage=SMALL, reward=noisy, **how):
    return rollout.Rollouts(
        model,
        encoder,
        world.World().stream(stage.mixture, stage.seed, 1),
        stage,
        reward=reward,
        **how,
    )


def test_a_real_rollout_scores_as_it_was_sampled(model, encoder):
    for temperature in (1.0, 0.7):
        stage = replace(SMALL, mixture={"counting": 1.0, "video": 1.0}, temperature=temperature)
        (batch,) = next(make(model, encoder, stage))
        means = policy(model, batch, stage)[1]["means"]
        assert means["kl"] < 1e-6 and means["clip_fraction"] == 0 and means["spread"] < 1e-4
        logp = sampled_logprobs(model, batch, temperature)
        torch.testing.assert_close(logp.detach(), batch.old, rtol=1e-4, atol=1e-5)
        assert batch.mask.sum() == len(batch.labels) == len(batch.at)


def test_every_sampled_id_is_a_label_the_end_token_too(model, encoder):
    with torch.no_grad():  # a model that ends soon, and often
        model.language_model.lm_head.weight[encoder.tokenizer.end] *= 4
    rollouts = make(model, encoder)
    rollouts.collect()
    sampled = [c.answer for part in rollouts.queue for c in part]
    batches = [b for _ in range(2) for b in next(rollouts)]
    assert [i for b in batches for i in b.labels.tolist()] == [i for a in sampled for i in a.ids]
    ends = sum(a.ids[-1] == encoder.tokenizer.end for a in sampled)
    assert ends > 0 and sum(int((b.labels == encoder.tokenizer.end).sum()) for b in batches) == ends
    assert all(b.ids.shape[1] == sum(b.segments.lengths) for b in batches)


def test_rollouts_end_when_every_group_agrees(model, encoder):
    stage = replace(SMALL, dynamic=True, tries=2)
    (batch,) = next(make(model, encoder, stage, reward=lambda *a: {"reward": 1.0}))
    assert (batch.advantage == 0).all() and batch.stats["useless"] == 1 and batch.weight > 0
    total, _ = policy(model, batch, stage)
    total.backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in model.parameters())


def test_dynamic_sampling_keeps_only_groups_that_disagree_and_fills_the_gaps(model, encoder):
    """Samples 0 and 1 teach nothing: 2 and 3 are kept, a second round brings 4 and 5, and 6 and 7
    are never asked for. With
    only sample 0 useless, 1 to 3 are kept and the second round brings one too many."""
    for useless, wanted in ((2, {2, 3, 4, 5}), (1, {1, 2, 3, 4})):
        flip = itertools.count()

        def agree(text, sample, finished):
            return {
                "reward": float(next(flip) % 2 and int(sample.origin.split("/")[-1]) >= useless)
            }

        rollouts = make(model, encoder, replace(SMALL, dynamic=True, tries=4), reward=agree)
        rollouts.collect()
        assert {
            c.index for part in rollouts.queue for c in part
        } == wanted and rollouts.next_number == 6
        assert rollouts.stats["useless"] == pytest.approx(useless / 6)


def test_a_group_without_a_verdict_is_dropped_and_counted(model, encoder):
    def unsure(text, sample, finished):
        return {"reward": math.nan if sample.origin.endswith("/1") else float(len(text) % 2)}

    rollouts = make(model, encoder, reward=unsure)
    rollouts.collect()
    assert rollouts.stats["unjudged"] == 0.25 and {
        c.index for part in rollouts.queue for c in part
    } == {0, 2, 3}


def test_minibatches_use_every_rollout_as_often_as_there_are_passes(model, encoder):
    rollouts = make(model, encoder, replace(SMALL, passes=2, updates=4))
    rollouts.collect()
    used = [(c.index, tuple(c.answer.ids)) for part in rollouts.queue for c in part]
    assert [len(part) for part in rollouts.queue] == [6] * 4 and used[:12] == used[12:]


def test_accumulation_changes_no_gradient(model, encoder):
    stage = replace(SMALL, algorithm="grpo")

    def gradient(accumulate):
        micro = next(make(model, encoder, replace(stage, accumulate=accumulate)))
        for b in micro:
            (policy(model, b, stage)[0] / sum(b.weight for b in micro)).backward()
        out = torch.cat([p.grad.flatten() for p in model.parameters()])
        model.zero_grad()
        return len(micro), out

    (one, whole), (three, parts) = gradient(1), gradient(3)
    assert (one, three) == (1, 3) and whole.abs().max() > 1e-3
    torch.testing.assert_close(whole, parts, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("experts", [False, True])
def test_a_prompt_that_its_completions_share_changes_neither_loss_nor_gradient(
    config, model, encoder, experts
):
    """One row in which prompt and pictures stand once a group, against one completion a row."""
    model = small_moe(config) if experts else model
    stage = replace(SMALL, replay=experts, balance=0.0)
    rollouts = make(model, replace(encoder, config=model.config), stage)
    rollouts.collect()
    part = [replace(c, advantage=(-1.0) ** i) for i, c in enumerate(rollouts.queue[0])]
    together = rollout.pack_rollouts(part, encoder, stage, {})
    alone = [rollout.pack_rollouts([c], encoder, stage, {}) for c in part]
    groups = len({c.index for c in part})
    assert (
        groups < len(part)
        and len(together.images) == groups
        and sum(len(b.images) for b in alone) == len(part)
    )
    assert together.ids.shape[1] < sum(b.ids.shape[1] for b in alone) and len(
        together.owners
    ) == len(together.segments.lengths)

    def gradient(batches):
        model.zero_grad()
        total = sum(policy(model, b, stage)[0] for b in batches)
        total.backward()
        return total.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])

    (loss, one), (losses, many) = gradient([together]), gradient(alone)
    assert one.abs().max() > 1e-3
    torch.testing.assert_close(loss, losses, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one, many, rtol=1e-3, atol=1e-4 * float(one.abs().max()))


@pytest.mark.parametrize("experts", [False, True])
def test_the_ratio_starts_at_one_in_bf16_too(config, model, encoder, experts):
    """Sampled tokens are scored again by the update's forward: a cached step rounds otherwise, and
    GSPO's bounds are 3e-4."""
    model = small_moe(config) if experts else model
    stage = replace(SMALL, algorithm="gspo", precision="bf16", dynamic=False)
    (batch,) = next(make(model, replace(encoder, config=model.config), stage))
    with torch.autocast("cpu", torch.bfloat16):
        _, stats = policy(model, batch, stage)
    assert stats["means"]["spread"] < 1e-6 and stats["means"]["clip_fraction"] == 0
    rough = make(model, replace(encoder, config=model.config), stage).micro_batches()[
        0
    ]  # sampled in fp32
    with torch.autocast("cpu", torch.bfloat16):
        assert policy(model, rough, stage)[1]["means"]["spread"] > 1e-4


@pytest.mark.parametrize("together", [1, 2, 8])
@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("family", ["counting", "text"])
def test_in_bf16_the_first_ratio_is_exactly_one_however_many_stand_in_a_micro_batch(
    config, model, encoder, experts, together, family
):
    """With pictures and without, dense and MoE: old log-probabilities are those of the update's rows."""
    model = small_moe(config) if experts else model
    stage = replace(
        SMALL,
        mixture={"counting": 1.0, "text": float(family == "text")},
        algorithm="gspo",
        precision="bf16",
        prompts=2,
        group=8,
        updates=2,
        accumulate=8 // together,
    )
    batches = next(make(model, replace(encoder, config=model.config), stage))
    assert [len(batch.advantage) for batch in batches] == [together] * (8 // together)
    assert any(batch.images is not None for batch in batches) == (family == "counting")
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16):
            logp = sampled_logprobs(model, batch, stage.temperature)
        assert torch.equal(logp.detach() * batch.mask, batch.old)


@pytest.mark.parametrize("replay", [False, True])
def test_a_resumed_run_gives_the_minibatches_of_the_uninterrupted_one(config, encoder, replay):
    stage, model = replace(SMALL, replay=replay), SailVL(config).init_weights(0)
    if replay:
        model = model.to_moe(
            replace(
                config.text,
                num_experts=4,
                num_experts_per_tok=2,
                moe_intermediate_size=config.text.intermediate_size,
            )
        )
    encoder = replace(encoder, config=model.config)
    whole = make(model, encoder, stage)
    steps = [next(whole)[0] for _ in range(5)]
    for after in (1, 2, 3):
        first = make(model, encoder, stage)
        for _ in range(after):
            next(first)
        second = make(model, encoder, stage)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        for want in steps[after:]:
            (got,) = next(second)
            for key in ("ids", "labels", "old", "mask", "advantage"):
                assert torch.equal(getattr(got, key), getattr(want, key))
            assert torch.equal(got.images, want.images) and got.stats == want.stats
            assert not replay or all(map(torch.equal, got.choices, want.choices))


def test_the_reward_of_the_control_is_a_coin(model, encoder):
    groups = rollout.rollout(
        model,
        encoder,
        [world.sample(i, 0, {"odd": 1.0}, turns=1) for i in range(20)],
        replace(SMALL, reward="random"),
        3,
    )
    coins = [r for g in groups for r in g.rewards()]
    assert (
        set(coins) == {0.0, 1.0}
        and 20 < sum(coins) < 40
        and all(p["answer"] == 0 for g in groups for p in g.parts)
    )


# -------------------------------------------------------------------------------------- routing


def small_moe(config):
    model = (
        SailVL(config)
        .init_weights(0)
        .to_moe(
            replace(
                config.text,
                num_experts=4,
                num_experts_per_tok=2,
                moe_intermediate_size=config.text.intermediate_size,
            )
        )
    )
    with torch.no_grad():  # experts that differ, as after training
        for block in model.language_model.model.layers:
            block.mlp.experts.down_proj.mul_(
                1 + 0.3 * torch.randn(4, 1, 1, generator=torch.Generator().manual_seed(1))
            )
    return model


def test_replayed_routing_keeps_the_experts_and_still_trains_the_router(config, encoder):
    model = small_moe(config)
    stage = replace(SMALL, algorithm="grpo", replay=True, balance=0.0)
    batch = next(
        b for (b,) in make(model, replace(encoder, config=model.config), stage) if b.advantage.any()
    )  # some learn nothing
    total, stats = policy(model, batch, stage)
    # the policy itself: nothing to replay yet
    assert stats["means"]["spread"] < 1e-4 and stats["means"]["rerouted"] == 0
    total.backward()
    gates = [block.mlp.gate.weight for block in model.language_model.model.layers]
    assert all(g.grad.abs().sum() > 0 for g in gates)
    start, moved, free = [g.clone() for g in gates], [], []
    for seed in range(8):  # a single move of the routers may happen to say the opposite
        with torch.no_grad():
            for g, was in zip(gates, start):
                g.copy_(
                    was + 0.3 * torch.randn(g.shape, generator=torch.Generator().manual_seed(seed))
                )
        moved.append(policy(model, batch, stage)[1])
        free.append(policy(model, replace(batch, choices=None), stage)[1])
    assert all(m["means"]["rerouted"] > 0.05 for m in moved)
    spreads = [sum(s["means"]["spread"] for s in some) for some in (moved, free)]
    assert spreads[0] < spreads[1]


def test_replayed_routing_with_recomputed_activations_gives_the_same_gradient(config, encoder):
    model, stage = small_moe(config), replace(SMALL, replay=True)
    batch = next(
        b for (b,) in make(model, replace(encoder, config=model.config), stage) if b.advantage.any()
    )
    grads = []
    for model.language_model.recompute in (False, True):
        model.zero_grad()
        policy(model, batch, stage)[0].backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*grads)


def test_replaying_the_live_choices_is_the_live_layer(config):
    layer, x = (
        small_moe(config).language_model.model.layers[0].mlp,
        torch.randn(7, config.text.hidden_size),
    )
    live = moe.Decisions()
    want = layer(x, live)
    (decision,) = live
    torch.testing.assert_close(layer(x, moe.Replay([decision.indices])), want)
    other = moe.Replay([(decision.indices + 1) % 4])
    assert (
        not torch.allclose(layer(x, other), want)
        and other.rerouted_share() > 0
        and torch.equal(next(iter(other)).indices, (decision.indices + 1) % 4)
    )


# ------------------------------------------------------------------------------------ the stage


def test_a_bandit_learns_its_best_arm_under_every_algorithm():
    """One token, five arms, reward for one of them: p(best) must pass 0.95."""
    for name, a in ALGORITHMS.items():
        logits = torch.zeros(5, requires_grad=True)
        optimizer, g = torch.optim.Adam([logits], lr=0.1), torch.Generator().manual_seed(0)
        for _ in range(120):
            arms = torch.multinomial(logits.softmax(0).detach(), 16, replacement=True, generator=g)
            logp = F.log_softmax(logits, 0)[arms][:, None]
            total, _ = loss(
                name, logp, logp.detach(), torch.ones(16, 1), a.advantage((arms == 3).float(), 16)
            )
            optimizer.zero_grad()
            (total / 16).backward()
            optimizer.step()
        assert logits.softmax(0)[3] > 0.95, name


def test_a_stage_raises_its_reward_and_its_control_does_not(config, encoder):
    """Reward: the share of one letter in the text. A few updates on an untrained model must raise
    it, a coin must not."""

    def go(name, reward=None):
        model = SailVL(config).init_weights(0)
        stage = RLStage(
            "x",
            ("llm",),
            {"counting": 1.0},
            steps=12,
            lr=7e-3,
            prompts=8,
            group=8,
            updates=1,
            max_new=8,
            overlong=0,
            algorithm=name,
            turns=1,
            schedule="constant",
            dynamic=False,
            reward="verifiable" if reward else "random",
        )
        log = fit(Setup(model, encoder, world.World(), reward=reward), stage).log
        return log[0]["reward"], log[-1]["reward"]

    def letter(text, sample, finished):
        return {"reward": text.count("e") / 8}

    before, after = go("dapo", letter)
    assert after > 1.5 * before, (before, after)
    before, after = go("dapo")
    assert abs(after - before) < 0.25


def test_a_weak_extractor_is_exploited_and_ours_is_not(config, encoder):
    """The same policy, paid when the truth stands anywhere: it learns to name numbers without ever
    answering."""
    model = SailVL(config).init_weights(0)
    with torch.no_grad():  # one that says numbers now and then, as any trained model does
        model.language_model.lm_head.weight[
            [encoder.tokenizer.encode(str(i))[0] for i in range(1, 7)]
        ] *= 2.5
    questions = [world.sample(i, 0, {"counting": 1.0}, turns=1) for i in range(4)]
    stage = RLStage(
        "x",
        ("llm",),
        {},
        steps=8,
        lr=5e-3,
        prompts=4,
        group=16,
        updates=1,
        max_new=8,
        overlong=0,
        schedule="constant",
        dynamic=False,
    )
    source = SimpleNamespace(stream=lambda *_: Drawn(lambda n: questions[n % 4]), root=None)
    log = fit(Setup(model, encoder, source, reward=algorithms.weak_reward), stage).log
    assert sum(r["reward"] for r in log[-3:]) > 2 * sum(r["reward"] for r in log[:3])
    assert all(r["answer"] == 0 for r in log)  # what our extractor paid


def test_the_kl_penalty_is_measured_against_the_reference_and_is_the_gradient_when_rewards_agree(
    model, config, encoder
):
    reference, stage = SailVL(config).init_weights(0), replace(SMALL, kl=0.5, algorithm="grpo")
    with torch.no_grad():
        model.language_model.lm_head.weight.mul_(1.5)
    (batch,) = next(
        make(model, encoder, stage, reward=lambda *a: {"reward": 1.0}, reference=reference)
    )
    torch.testing.assert_close(batch.reference, sampled_logprobs(reference, batch, 1.0).detach())
    total, stats = policy(model, batch, stage)
    distance = float(stats["kl_reference"])
    assert distance > 0.05 * batch.weight and total.item() == pytest.approx(0.5 * distance)
    total.backward()
    with torch.no_grad():  # a small step down on this very batch lowers it
        for p in model.parameters():
            if p.grad is not None:
                p -= 1e-3 * p.grad / batch.weight
    assert policy(model, batch, stage)[0] < total


@pytest.mark.slow
def test_two_processes_equal_one(config, tokenizer, tmp_path):
    """The same global rollout batch, minibatches and weights, on one rank and on two: sampling is
    by call, not by rank."""
    model = SailVL(config).init_weights(0)
    model.save_pretrained(tmp_path / "start")
    tokenizer.save(tmp_path / "start")
    words = [
        "rl.py",
        "verifiable",
        "--model",
        tmp_path / "start",
        "--steps",
        "4",
        "--prompts",
        "6",
        "--batch",
        "3",
        "--group",
        "2",
        "--updates",
        "2",
        "--max-new",
        "6",
        "--overlong",
        "2",
        "--dynamic",
        "False",
        "--reward",
        "random",
        "--optimizer",
        "adamw",
        "--lr",
        "1e-3",
    ]
    for name, launch in (
        ("one", []),
        ("two", ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]),
    ):
        done = subprocess.run(
            [sys.executable, *launch, *map(str, words), "--out", str(tmp_path / name)],
            cwd=ROOT,
            text=True,
            capture_output=True,
            timeout=170,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    start = load_file(tmp_path / "start" / "model.safetensors")
    assert max(float((one[k] - start[k]).abs().max()) for k in one) > 1e-3
    assert max(float((one[k] - two[k]).abs().max()) for k in one) < 5e-5
    logs = [
        [json.loads(line) for line in open(tmp_path / name / "log.jsonl")]
        for name in ("one", "two")
    ]
    for a, b in zip(*logs, strict=True):
        for key in ("reward", "length", "entropy", "useless", "loss"):
            assert a[key] == pytest.approx(b[key], abs=1e-5), key


def test_a_token_ratio_spreads_more_than_a_sequence_ratio():
    logp, old, mask, _ = tensors(spread=0.3)
    whole = sequence_log_ratio(logp, old, mask)
    assert whole.square().mean() < ((logp - old).square() * mask).sum() / mask.sum()
    torch.testing.assert_close(whole[2, 0], (logp - old)[2, 0])  # a completion of one token


def test_the_toy_presets_moe_takes_the_dense_weights(config):
    text = replace(
        PRESETS["toy-moe"].text,
        vocab_size=config.text.vocab_size,
        num_hidden_layers=config.text.num_hidden_layers,
    )
    model = SailVL(config).init_weights(0)
    ids = torch.arange(1, 9)[None]
    torch.testing.assert_close(model.to_moe(text)(ids), model(ids), rtol=1e-4, atol=1e-4)


def test_ranks_share_a_minibatch_out_in_full(model, encoder):
    stage = replace(SMALL, prompts=6, accumulate=2)
    rollouts = make(model, encoder, stage, ranks=Ranks(0, 3))
    minibatch = list("abcdefg")
    shares = [rollouts.parts_of(minibatch, rank) for rank in range(3)]
    assert shares == [[["a"], ["b"]], [["c"], ["d"]], [["e", "f"], ["g"]]]


def test_rollouts_end_with_their_stream_the_last_batch_smaller(model, encoder):
    source = world.World().stream(SMALL.mixture, SMALL.seed, 1)
    five = iter([source[n] for n in range(5)])
    rollouts = rollout.Rollouts(model, encoder, five, SMALL, reward=noisy)
    sizes = [sum(len(batch.at) > 0 for batch in step) for step in rollouts]
    assert sizes == [1, 1, 1] and rollouts.ended


def test_ranks_draw_the_same_and_one_of_them_counts_what_is_left_out(model, encoder):
    def drawn(rank, strict=False):
        source = world.World().stream(SMALL.mixture, SMALL.seed, 1)
        stream = [source[0], BadSample("broken", "x"), source[1], source[2]]
        faults = Faults(strict)
        rollouts = rollout.Rollouts(
            model, encoder, iter(stream), SMALL, Ranks(rank, 2), noisy, faults=faults
        )
        return [number for number, _ in rollouts.draw(3)], dict(faults.counts)

    assert drawn(0) == ([0, 2, 3], {"broken": 1})
    assert drawn(1) == ([0, 2, 3], {})
    for rank in (0, 1):
        with pytest.raises(BadSample):
            drawn(rank, strict=True)


def test_an_update_in_no_part_is_refused():
    with pytest.raises(ValueError, match="--accumulate 0: at least 1"):
        oddities(replace(SMALL, accumulate=0))


def test_between_two_rewards_somebody_looks_whether_to_stop(monkeypatch):
    """Rewards may take minutes each: a stop is heard after every one."""
    looked = []
    monkeypatch.setattr(rollout, "check_stop", lambda: looked.append(True))
    completions = [("3", None, True)] * 3
    assert rollout.earned(lambda *_: {"reward": 1.0}, completions) == [{"reward": 1.0}] * 3
    assert len(looked) == 3


def test_a_rank_without_a_share_runs_the_same_modules_at_weight_zero():
    """Two ranks, one completion: the other rank's forward is there for collectives, and counts nothing."""
    batches = rollout.Rollouts.__new__(rollout.Rollouts)
    batches.queue = [["a completion"]]
    batches.ranks = SimpleNamespace(rank=1, size=2)
    batches.pack = lambda part, empty=False: (part, empty)
    batches.parts_of = lambda minibatch, rank: [minibatch] if rank == 0 else []
    assert batches.micro_batches() == [(["a completion"], True)]
