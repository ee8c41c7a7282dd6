"""Against transformers: random tiny Qwen3, Qwen3-MoE and AIMv2.

Written by it, read by us, run and differentiated by both; and back: what we write, it loads.
"""

import random

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    Aimv2VisionConfig,
    Aimv2VisionModel,
    AutoModelForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from attention import Segments, attend_inside
from llm import LLM
from moe import Decisions, balance_loss
from vit import ViT, transformers_names


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def near(a, b, name, tolerance=1e-4):
    """Equal gradients: the difference is small beside the gradient."""
    assert b.norm() > 0, name
    assert (a - b).norm() <= tolerance * b.norm(), (name, float((a - b).norm() / b.norm()))


@torch.no_grad()
def uneven(model):
    """Norms and biases start equal; here every value is its own, so that none can be taken for another."""
    for p in model.parameters():
        if p.ndim == 1:
            p.uniform_(0.5, 1.5)
    return model.eval()


def qwen3(seed: int):
    """A random tiny configuration: odd head counts, every way of sharing keys, tied and not.

    Dense, and MoE for odd seeds.
    """
    rng = random.Random(seed)
    groups = rng.choice([1, 2, 3, 5])
    sizes = dict(
        vocab_size=rng.randrange(50, 90),
        hidden_size=4 * rng.randrange(4, 12),
        intermediate_size=4 * rng.randrange(5, 16),
        num_hidden_layers=rng.randint(1, 3),
        num_attention_heads=groups * rng.choice([1, 2, 3, 7]),
        num_key_value_heads=groups,
        head_dim=2 * rng.randrange(2, 9),
        rope_theta=rng.choice([1e4, 1e6]),
        rms_norm_eps=rng.choice([1e-6, 1e-5]),
        tie_word_embeddings=seed % 4 > 1,
        initializer_range=0.3,
        attn_implementation="eager",
    )
    torch.manual_seed(seed)
    if seed % 2 == 0:
        return uneven(Qwen3ForCausalLM(Qwen3Config(**sizes)))
    experts = rng.randint(3, 9)
    return uneven(
        Qwen3MoeForCausalLM(
            Qwen3MoeConfig(
                **sizes,
                num_experts=experts,
                num_experts_per_tok=rng.randint(2, 3),
                moe_intermediate_size=4 * rng.randint(2, 5),
                norm_topk_prob=seed % 8 > 3,
                output_router_logits=True,
            )
        )
    )


def test_the_random_configurations_cover_what_they_should():
    configs = [qwen3(seed).config for seed in range(16)]
    assert {c.num_attention_heads % 2 for c in configs} == {0, 1} and len(
        {c.num_attention_heads // c.num_key_value_heads for c in configs}
    ) > 2
    assert {(c.model_type, c.tie_word_embeddings) for c in configs} == {
        (m, t) for m in ("qwen3", "qwen3_moe") for t in (True, False)
    }
    assert {c.norm_topk_prob for c in configs if c.model_type == "qwen3_moe"} == {True, False}


@pytest.mark.parametrize("seed", range(16))
def test_a_language_model_has_transformers_logits_balance_loss_and_gradients(seed, tmp_path):
    theirs = qwen3(seed)
    theirs.save_pretrained(tmp_path)
    ours = LLM.from_pretrained(tmp_path)
    ids = torch.randint(
        theirs.config.vocab_size, (2, 11), generator=torch.Generator().manual_seed(seed)
    )
    out, routing, segments = theirs(ids), Decisions(), Segments.of([11, 11])
    logits = ours.lm_head(
        ours(
            ours.embed(ids.flatten()), segments.positions(), attend_inside(segments, True), routing
        )
    ).view(2, 11, -1)
    close(logits, out.logits)
    sides = [logits, out.logits]
    losses = [F.cross_entropy(side[:, :-1].flatten(0, 1), ids[:, 1:].flatten()) for side in sides]
    if routing:
        close(balance_loss(routing), out.aux_loss, 1e-6)
        losses = [
            loss + 0.1 * balance
            for loss, balance in zip(losses, (balance_loss(routing), out.aux_loss))
        ]
    for loss in losses:
        loss.backward()
    expected = dict(theirs.named_parameters())  # in memory, their experts are stacked as ours
    assert expected.keys() == dict(ours.named_parameters()).keys()
    for name, p in ours.named_parameters():
        near(p.grad, expected[name].grad, name)


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("heads, width, side", [(3, 24, 4), (1, 20, 2), (5, 40, 3)])
def test_aimv2_has_transformers_features_and_gradients(native, heads, width, side, tmp_path):
    torch.manual_seed(heads)
    theirs = uneven(
        Aimv2VisionModel(
            Aimv2VisionConfig(
                hidden_size=width,
                intermediate_size=width + 12,
                num_hidden_layers=2,
                num_attention_heads=heads,
                image_size=14 * side,
                patch_size=14,
                use_head=False,
                is_native=native,
                initializer_range=0.2,
                attn_implementation="eager",
            )
        )
    )
    theirs.save_pretrained(tmp_path)
    ours = ViT.from_pretrained(tmp_path)
    assert (ours.config.position == "sincos") == native
    h, w = (3, 5) if native else (side, side)  # native AIMv2 takes any size
    pixels = torch.randn(2, 3, 14 * h, 14 * w)
    expected = theirs(pixels).last_hidden_state
    features, grids = ours(pixels)
    assert grids == [(h, w)] * 2
    close(features.view_as(expected), expected)
    direction = torch.randn_like(expected)
    (features.view_as(expected) * direction).sum().backward()
    (expected * direction).sum().backward()
    ours = {
        disk: g
        for name, p in ours.named_parameters()
        for disk, g in transformers_names(name, p.grad).items()
    }
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    assert ours.keys() == expected.keys()
    for name, g in ours.items():
        near(g, expected[name], name)


@pytest.mark.parametrize("seed", [0, 2, 1, 7])
@torch.no_grad()
def test_what_we_write_transformers_reads(seed, tmp_path):
    qwen3(seed).save_pretrained(tmp_path / "theirs")
    ours = LLM.from_pretrained(tmp_path / "theirs", torch.bfloat16)
    ours.save_pretrained(tmp_path / "ours")
    again, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(report.values()), report
    assert (
        again.config.tie_word_embeddings == ours.config.tie_word_embeddings
        and again.dtype == torch.bfloat16
    )
    theirs = dict(again.named_parameters())
    assert theirs.keys() == dict(ours.named_parameters()).keys()
    assert all(torch.equal(p, theirs[name]) for name, p in ours.named_parameters())
    assert again.config.rope_parameters["rope_theta"] == ours.config.rope_theta
