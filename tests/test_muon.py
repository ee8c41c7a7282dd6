"""Muon: bit for bit torch's, on one rank or several, which do a share each."""

import pytest
import torch

import optim
from optim import Muon, orthogonal

SHAPES = ((64, 64), (96, 32), (32, 96), (64, 64), (8, 200), (96, 32), (1, 7), (64, 64))


def trained(make, steps: int = 4) -> list[torch.Tensor]:
    """Matrices after some steps on made-up gradients, one of which is missing now and then."""
    noise = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(s, generator=noise)) for s in SHAPES]
    optimizer = make(
        [
            {"params": parameters[:5], "weight_decay": 0.1},
            {"params": parameters[5:], "weight_decay": 0.0, "lr": 3e-3},
        ]
    )
    for step in range(steps):
        for i, p in enumerate(parameters):
            p.grad = (
                torch.randn(p.shape, generator=noise) * 10.0 ** (i - 4) if (i + step) % 5 else None
            )
        optimizer.step()
    return [p.detach() for p in parameters]


def torchs() -> list[torch.Tensor]:
    return trained(lambda groups: torch.optim.Muon(groups, lr=1e-2, adjust_lr_fn="match_rms_adamw"))


def ours() -> list[torch.Tensor]:
    return trained(lambda groups: Muon(groups, lr=1e-2))


def one_rank(rank: int, size: int, place: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{place}/meet{size}", rank=rank, world_size=size
    )
    calls = []
    import optim

    plain = optim.orthogonal
    optim.orthogonal = lambda updates: calls.append(len(updates)) or plain(updates)
    torch.save({"weights": ours(), "did": sum(calls)}, f"{place}/{size}-{rank}.pt")
    torch.distributed.destroy_process_group()


def test_in_bf16_it_is_torchs_muon_to_the_last_bit(monkeypatch):
    monkeypatch.setattr(optim, "fast_precision", lambda matrix: torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(ours(), torchs()))


def test_a_cpu_keeps_its_own_precision_where_bf16_rounds_by_percents():
    generator = torch.Generator().manual_seed(0)
    double = torch.randn(40, 90, generator=generator, dtype=torch.float64)
    (exact,) = orthogonal([double])
    for dtype, error in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        (found,) = orthogonal([double.to(dtype)])
        assert found.dtype == dtype and (found - exact).norm() < error * exact.norm()
    assert optim.fast_precision(double) == torch.float64
    assert optim.fast_precision(double.float()) == torch.float32


@pytest.mark.slow
def test_ranks_share_the_work_and_end_with_the_same_bits(tmp_path, size=3):
    torch.multiprocessing.spawn(one_rank, (size, str(tmp_path)), nprocs=size)
    found = [torch.load(tmp_path / f"{size}-{rank}.pt") for rank in range(size)]
    whole = ours()
    assert all(torch.equal(a, b) for f in found for a, b in zip(f["weights"], whole))
    every = sum(1 for step in range(4) for i in range(len(SHAPES)) if (i + step) % 5)
    assert sum(f["did"] for f in found) == every and min(f["did"] for f in found) > 0


def test_singular_values_end_near_one():
    values = torch.linalg.svdvals(orthogonal([torch.randn(40, 90).bfloat16()])[0].float())
    assert 0.6 < values.min() and values.max() < 1.3


def test_only_matrices():
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        Muon([torch.nn.Parameter(torch.zeros(3))])
