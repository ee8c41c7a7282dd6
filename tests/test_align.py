"""Distances of known clouds, a probe that can and cannot know, log laws, and the command."""

import json

import pytest
import torch
from conftest import EVERY

from claims import alignment
from claims.alignment import (
    AlignmentOptions,
    distances,
    log_law,
    measure_alignment,
    pca,
    probe_accuracy,
    table7,
)
from data import world


def cloud(n: int, shift=(0.0, 0.0), seed: int = 0):
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(seed)) + torch.tensor(shift)


def test_the_distances_of_a_cloud_to_itself_and_to_its_shifted_copy():
    a = cloud(500)
    same = distances(a, a)
    assert (
        same.nearest == pytest.approx(0, abs=1e-3)
        and same.wasserstein == 0
        and same.mean == pytest.approx(1.77, abs=0.1)
    )
    far = distances(a, a + torch.tensor([10.0, 0.0]))
    assert far.wasserstein == pytest.approx(
        10 * 2 / torch.pi, rel=0.1
    )  # mean of |cos| over directions
    assert far.mean == pytest.approx(10.2, abs=0.2) and 6 < far.nearest < 9.5
    assert distances(a, torch.tensor([[3.0, 4.0]])).mean == pytest.approx(
        float((a - torch.tensor([3.0, 4.0])).norm(dim=1).mean()), rel=1e-5
    )


def test_closer_clouds_are_closer_by_every_measure():
    near, far = (distances(cloud(300), cloud(200, (s, s), 1)) for s in (0.5, 3.0))
    assert (
        near.nearest < far.nearest and near.wasserstein < far.wasserstein and near.mean < far.mean
    )


def test_pca_finds_the_long_axes_in_any_orientation():
    x = (
        torch.randn(400, 6, generator=torch.Generator().manual_seed(0))
        * torch.tensor([5.0, 3, 0.1, 0.1, 0.1, 0.1])
        + 7
    )
    turned = x @ torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1)))[0]
    y = pca(turned, 2)
    assert y.shape == (400, 2) and y.mean(0).abs().max() < 1e-4
    assert y.std(0).tolist() == pytest.approx([5, 3], rel=0.1)


def test_a_probe_reads_what_is_there_and_not_what_is_not():
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (600,), generator=g)
    features = torch.randn(600, 8, generator=g) + 3 * torch.nn.functional.one_hot(labels, 8)
    assert probe_accuracy(features[:400], labels[:400], features[400:], labels[400:]) > 0.85
    noise = torch.randn(600, 8, generator=g)
    assert probe_accuracy(noise[:400], labels[:400], noise[400:], labels[400:]) < 0.4


def test_a_log_law_is_found_and_its_r2_tells_it_from_noise():
    x = [1, 10, 100, 1000]
    assert log_law(x, [0.1, 0.3, 0.5, 0.7]) == pytest.approx((0.1, 0.2, 1.0))
    assert log_law(x, [0.5, 0.1, 0.6, 0.2])[2] < 0.2
    with pytest.raises(ValueError, match="2 points"):
        log_law([1, 2], [1, 2])


def test_both_versions_of_table_7_see_an_adapter_that_moves_to_the_embeddings(model, encoder):
    images = [encoder.images(world.sample(i, 0, EVERY))[0] for i in range(40)]
    images = [found[0] for found in images if found]
    before = table7(model, images)
    with torch.no_grad():
        for p in list(model.mlp1.parameters())[
            -2:
        ]:  # the last layer then says one row of the table, always
            p.zero_()
        list(model.mlp1.parameters())[-1].copy_(model.language_model.model.embed_tokens.weight[3])
    after = table7(model, images)
    assert after["adapter"].nearest == pytest.approx(0, abs=1e-2) and before["adapter"].nearest > 1
    assert after["after PCA"] == before["after PCA"]  # it looks at the ViT only


def test_own_units_do_not_see_that_a_cloud_grew(model, encoder):
    images = [encoder.images(s)[0][0] for s in world.World().held_out("caption", 10)]
    before = table7(model, images)
    with torch.no_grad():
        model.vision_model.trunk.post_trunk_norm.weight.mul_(10)
    after = table7(model, images)
    assert after["after PCA"].mean > 3 * before["after PCA"].mean
    assert after["own units"].mean == pytest.approx(before["own units"].mean, rel=1e-4)


def test_the_probe_of_a_model_runs_on_held_out_pictures(model, encoder):
    accuracy, chance = alignment.table6(model, encoder, "counting", n=60)
    assert 0 <= accuracy <= 1 and 0.1 < chance < 0.8


def test_a_curve_is_read_from_the_checks_of_a_log(tmp_path, capsys):
    rows = [{"step": step, "loss": 1.0} for step in (0, 4)]
    for step, accuracy in ((0, 0.1), (9, 0.3), (99, 0.5)):
        rows.append({"step": step, "check": {"accuracy": accuracy}})
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert measure_alignment(AlignmentOptions(curve=log)) == 0
    assert "0.100 + 0.200 log10(step), R^2 1.000, 3 checks" in capsys.readouterr().out


def test_asking_for_nothing_is_an_error():
    with pytest.raises(ValueError, match="--model, --curve or --toy"):
        measure_alignment(AlignmentOptions())
