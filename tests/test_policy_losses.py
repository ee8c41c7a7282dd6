"""Corners of the policy losses: what has moved very far is still pulled back, and nothing overflows."""

import math

import pytest
import torch

from policy_losses import (
    ALGORITHMS,
    aggregate,
    clipped,
    divisor,
    kl_penalty,
    log_ratio,
    loss,
    overlong_penalty,
    sequence_log_ratio,
)

FAR = (-1000.0, -25.0, 25.0, 1000.0)


def one(moved):
    """One completion of one token whose log-ratio is `moved`."""
    old = torch.tensor([[-2000.0]], dtype=torch.double)
    logp = (old + moved).requires_grad_()
    return logp, old, torch.ones(1, 1)


@pytest.mark.parametrize("moved", FAR)
def test_a_log_ratio_is_bounded_and_keeps_its_gradient(moved):
    logp, old, mask = one(moved)
    found = log_ratio(logp, old, mask)
    assert found.item() == math.copysign(20, moved)
    found.backward()
    assert logp.grad.item() == 1


def test_inside_the_bound_nothing_is_changed():
    x = torch.linspace(-20, 20, 101, dtype=torch.double).view(1, -1).requires_grad_()
    zero = torch.zeros_like(x)
    assert torch.equal(log_ratio(x, zero, torch.ones_like(x)), x)
    assert torch.autograd.gradcheck(lambda t: log_ratio(t, zero, torch.ones_like(t)), x * 0.99)


@pytest.mark.parametrize("A, ratio", [(1.0, 1.25), (-1.0, 0.75)])
def test_a_ratio_on_the_bound_is_not_clipped_yet(A, ratio):
    """(Powers of two: the bound is met exactly.)"""
    one = torch.tensor([[ratio]], dtype=torch.double)
    gain, cut = clipped(one, torch.tensor([[A]], dtype=torch.double), 0.25, 0.25)
    assert gain.item() == ratio * A and not cut.item()
    _, cut = clipped(one + math.copysign(2**-20, A), torch.tensor([[A]]), 0.25, 0.25)
    assert cut.item()


def test_infinities_stay_outside():
    logp = torch.tensor([[-1.0, -torch.inf, -1.0]], requires_grad=True)
    old = torch.tensor([[-torch.inf, -1.0, -torch.inf]])
    found = log_ratio(logp, old, torch.tensor([[1.0, 1.0, 0.0]]))
    assert found.tolist() == [[20, -20, 0]]
    found.sum().backward()
    assert logp.grad.tolist() == [[1, 1, 0]]


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("moved", FAR)
def test_the_kl_penalty_pulls_back_from_any_distance(estimator, moved):
    logp, reference, mask = one(moved)
    penalty = kl_penalty(logp, reference, mask, estimator)
    penalty.backward()
    assert math.isfinite(penalty.item()) and math.isfinite(logp.grad.item())
    if estimator == "k1":
        assert logp.grad.item() == 1  # of any size: a loss without a pull
    else:
        assert logp.grad.item() * moved > 0  # going down the gradient goes back


@pytest.mark.parametrize("name", ["ppo", "grpo", "dr_grpo", "dapo", "gspo"])
def test_a_bad_token_that_became_far_likelier_is_pushed_down(name):
    logp, old, mask = one(30.0)
    total, clip_fraction = loss(name, logp, old, mask, torch.tensor([-1.0], dtype=torch.double))
    total.backward()
    assert logp.grad.item() == pytest.approx(math.exp(20)) and clip_fraction == 0


@pytest.mark.parametrize("name", list(ALGORITHMS))
@pytest.mark.parametrize("A", [1.0, -1.0])
@pytest.mark.parametrize("moved", FAR)
def test_no_loss_and_no_gradient_is_ever_infinite(name, A, moved):
    logp, old, mask = one(moved)
    total, _ = loss(name, logp, old, mask, torch.tensor([A], dtype=torch.double))
    total.backward()
    assert math.isfinite(total.item()) and math.isfinite(logp.grad.item())
    if name not in ("reinforce", "cispo"):  # a move the way that A asks is clipped
        assert (logp.grad.item() == 0) == (A * moved > 0 or (name == "dual" and moved > 0))


def test_a_sequence_ratio_is_the_mean_over_its_own_tokens():
    logp = torch.tensor([[0.3, 0.1, 9.0], [30.0, 0.0, 0.0]], dtype=torch.double)
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    found = sequence_log_ratio(logp, torch.zeros_like(logp), mask)
    torch.testing.assert_close(found, torch.tensor([[0.2], [20 / 3]], dtype=torch.double))
    empty = sequence_log_ratio(logp, torch.zeros_like(logp), torch.zeros_like(mask))
    assert empty.tolist() == [[0], [0]]


def test_aggregation_is_an_option_by_its_name():
    logp, old, mask = torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([[1.0, 1, 1], [1, 0, 0]])
    A = torch.tensor([1.0, 1.0])
    sums = {
        name: loss("ppo", logp, old, mask, A, aggregation=name)[0].item()
        for name in ("tokens", "sequences", "budget", "completions")
    }
    assert sums == {"tokens": -4, "sequences": -2, "budget": -4, "completions": -4}
    assert [divisor(mask, name, 7) for name in sums] == [4, 2, 14, 2]
    assert aggregate(mask, mask, "sequences") == 2


def test_the_overlong_penalty_at_its_corners():
    found = [overlong_penalty(n, 20, 8) for n in (0, 12, 13, 16, 20, 50)]
    assert found == [0, 0, -1 / 8, -0.5, -1, -1]
    assert overlong_penalty(50, 20, 0) == 0
