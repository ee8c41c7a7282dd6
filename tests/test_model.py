"""The model: the released checkpoint's numbers, packing, positions, any resolution, strict loading."""

import itertools
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SHARED
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.func import functional_call

import attention
import moe
from adapter import pixel_shuffle
from attention import Segments, packed_attention
from data.encode import Encoder
from data.images import normalise
from data.sample import Message, Sample
from infra import weights
from llm import DEFINITIONS, IN_PLACE, LLM, WRITTEN_OUT, Elementwise, RMSNorm, rotary_table, rotate
from packing import collate
from vit import ViT
from vlm import PRESETS, SAIL_VIT, SailVL, VLMConfig, token_logprobs

RELEASED = SHARED / "released"
released = pytest.mark.skipif(not RELEASED.is_dir(), reason="the released files are not here")


# -------------------------------------------------------------------------- the released checkpoint


@pytest.fixture(scope="module")
def tiny():
    """A random checkpoint in the released layout, and what the released code computes with it."""
    golden = {k: torch.from_numpy(v) for k, v in np.load(RELEASED / "tiny" / "golden.npz").items()}
    model = SailVL.from_pretrained(RELEASED / "tiny").eval()
    model.image_token_id = int(golden["img_context_token_id"])
    return model, golden


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@released
@torch.no_grad()
def test_the_vit_computes_what_the_released_code_computes(tiny):
    model, golden = tiny
    features, grids = model.vision_model(golden["pixel_values"])
    assert grids == [(4, 4)] * 3
    close(features.view(3, 16, -1), golden["vit_last_hidden_state"])


@released
@torch.no_grad()
def test_the_adapter_computes_what_the_released_code_computes(tiny):
    model, golden = tiny
    out = model.mlp1(golden["vit_last_hidden_state"].flatten(0, 1), [(4, 4)] * 3)
    close(out.view(3, 4, -1), golden["adapter_output"])


@released
@torch.no_grad()
def test_logits_and_loss_are_those_of_the_released_code(tiny):
    model, golden = tiny
    ids, pixels, labels = golden["input_ids"], golden["pixel_values"], golden["labels"]
    close(model(ids, pixels), golden["logits"])
    at = (labels[0, 1:] != -100).nonzero()[:, 0]  # position t is asked for token t + 1
    close(-model.logprobs(ids, pixels, None, None, at, labels[0, at + 1]).mean(), golden["loss"])


@released
@pytest.mark.parametrize("shard_bytes", [5 << 30, 50_000])
def test_a_released_checkpoint_saved_again_keeps_every_name_and_bit(tiny, tmp_path, shard_bytes):
    model, _ = tiny
    before = load_file(RELEASED / "tiny" / "model.safetensors")
    weights.save_weights(model, tmp_path, model.config.to_dict(), shard_bytes)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (shard_bytes < 1 << 20) == (tmp_path / weights.INDEX).is_file()
    after = {name: t for f in files for name, t in load_file(f).items()}
    assert after.keys() == before.keys()
    assert all(after[n].dtype == t.dtype and torch.equal(after[n], t) for n, t in before.items())
    again = weights.tensors(SailVL.from_pretrained(tmp_path))
    assert again.keys() == before.keys() and all(
        torch.equal(again[n], t) for n, t in before.items()
    )


@released
def test_the_2b_preset_has_exactly_the_490_released_names_and_the_released_configuration():
    with torch.device("meta"):
        model = SailVL(PRESETS["SAIL-VL2-2B"])
    index = json.loads((RELEASED / "model.safetensors.index.json").read_text())
    ours = weights.tensors(model)
    assert len(index["weight_map"]) == 490 and ours.keys() == index["weight_map"].keys()
    assert sum(t.numel() for t in ours.values()) * 2 == index["metadata"]["total_size"]  # bf16
    read = VLMConfig.from_dict(json.loads((RELEASED / "config.json").read_text()))
    assert read.vision == model.config.vision
    assert (
        replace(read.text, tie_word_embeddings=False) == model.config.text
    )  # the config says tied, the file is not


@pytest.mark.parametrize(
    "preset, parameters",
    [
        ("SAIL-VL2-2B", 2_730_565_120),
        ("SAIL-VL2-8B", 8_914_730_496),
        ("SAIL-VL2-30B-A3B", 682_031_616 + 30_532_122_624 + 16_793_600),
        ("SAIL-VL2-1B", 682_031_616 + 596_049_920 + 7_354_368),
    ],
)
def test_a_preset_has_exactly_the_published_number_of_parameters(preset, parameters):
    with torch.device("meta"):
        model = SailVL(PRESETS[preset])
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("size, parameters", [("large", 309_984_256), ("huge", 682_031_616)])
def test_sail_vit_at_448_pixels_has_exactly_the_published_number_of_parameters(size, parameters):
    with torch.device("meta"):
        model = ViT(SAIL_VIT[size])
    assert (
        model.config.image_size == 448 and sum(p.numel() for p in model.parameters()) == parameters
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_a_configuration_survives_being_written_and_read(preset):
    config = replace(
        PRESETS[preset],
        any_resolution=True,
        image_token_id=7,
        min_tiles=2,
        max_tiles=9,
        thumbnail=False,
    )
    assert VLMConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


# ------------------------------------------------------------------------------------------ packing


@pytest.fixture(scope="session")
def mixed(documents, encoder):
    """One and several images, a video, text only: six documents of four kinds."""
    one, none, video = ([d for d in documents if len(d.images) == n] for n in (1, 0, 3))
    picture = Image.fromarray(one[0].images[0])
    question = Message("user", (picture, " or ", picture.transpose(Image.Transpose.ROTATE_90), "?"))
    two = encoder(Sample((question, Message("assistant", ("the first",)))))
    return [one[0], none[0], video[0], two, one[1], none[1]]


def packed(group, tokenizer):
    """Two rows, the shorter one padded."""
    return collate([group[:3], group[3:]], None, tokenizer.pad)


def logits_of(model, batch):
    """The logits of each document of a batch, padding left out."""
    out = (
        model(batch.ids, batch.images, batch.positions, batch.segments)
        .flatten(0, 1)
        .split(batch.segments.lengths)
    )
    return [o for o, owner in zip(out, batch.owners) if owner != "padding"]


def alone(model, d):
    return model(torch.from_numpy(d.ids)[None], normalise(list(d.images)) if d.images else None)[0]


@torch.no_grad()
def test_a_packed_document_has_the_logits_it_has_alone(model, mixed, tokenizer):
    model.double()
    batch = packed(mixed, tokenizer)
    assert "padding" in batch.owners and {len(d.images) for d in mixed} == {0, 1, 2, 3}
    for d, together in zip(mixed, logits_of(model, batch), strict=True):
        close(together, alone(model, d), 1e-12)


@torch.no_grad()
def test_documents_of_equal_length_keep_the_logits_they_have_alone(model, mixed, tokenizer):
    model.double()
    group = [mixed[0], replace(mixed[0], images=(255 - mixed[0].images[0],)), mixed[0]]
    batch = collate([group], None, tokenizer.pad)
    assert len(set(batch.segments.lengths)) == 1  # takes the batched branch of packed_attention
    for d, together in zip(group, logits_of(model, batch), strict=True):
        close(together, alone(model, d), 1e-12)


@pytest.mark.parametrize("lengths", ["different", "equal"])
@pytest.mark.parametrize("change", ["ids", "pixels"])
@torch.no_grad()
def test_changing_one_document_leaves_the_others_bit_identical(
    model, mixed, tokenizer, change, lengths
):
    group = mixed if lengths == "different" else [mixed[2]] * 6
    before = logits_of(model, packed(group, tokenizer))
    for i, d in enumerate(group[:3]):
        if change == "ids":
            other = replace(d, ids=np.where(d.ids == tokenizer.image, d.ids, (d.ids + 7) % 200))
        else:
            other = replace(d, images=tuple(255 - image for image in d.images))
        after = logits_of(model, packed(group[:i] + [other] + group[i + 1 :], tokenizer))
        touched = change == "ids" or len(d.images) > 0
        assert [torch.equal(a, b) for a, b in zip(before, after)] == [
            j != i or not touched for j in range(len(group))
        ]


@torch.no_grad()
def test_no_token_sees_a_later_one(model, mixed):
    d = mixed[0]
    cut = len(d) // 2
    keep = (np.arange(len(d)) < cut) | (d.ids == model.image_token_id)
    other = replace(d, ids=np.where(keep, d.ids, (d.ids + 7) % 200))
    before, after = alone(model, d), alone(model, other)
    assert torch.equal(before[:cut], after[:cut]) and not torch.equal(before[cut], after[cut])


def test_gradients_of_a_packed_batch_are_the_sum_of_those_of_its_documents(model, mixed, tokenizer):
    model.double()

    def gradients(group):
        batch = collate(group, None, tokenizer.pad)
        logits = model(batch.ids, batch.images, batch.positions, batch.segments)
        loss = (
            F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none")
            * batch.weights.flatten()
        )
        return torch.autograd.grad(loss.sum(), list(model.parameters()))

    apart = [gradients([[d]]) for d in mixed]
    for (name, _), g, *parts in zip(
        model.named_parameters(), gradients([mixed[:3], mixed[3:]]), *apart, strict=True
    ):
        assert g.norm() > 0, name
        assert (g - sum(parts)).norm() <= 1e-11 * g.norm(), name


def test_positions_restart_and_borders_fall_where_documents_begin(mixed, tokenizer):
    """Asserted on the batch itself: RoPE sees only differences of positions, so logits cannot show it."""
    batch = packed(mixed, tokenizer)
    B, T = batch.ids.shape
    room = min(sum(map(len, mixed[:3])), sum(map(len, mixed[3:])))
    row = [len(d) for d in mixed[:3]], [len(d) for d in mixed[3:]]
    lengths = [n for r in row for n in r + ([T - room] if sum(r) == room else [])]
    assert batch.segments.lengths == tuple(lengths) and sum(lengths) == B * T
    assert (
        batch.segments.cu.tolist() == [0, *np.cumsum(lengths)]
        and batch.segments.cu.dtype == torch.int32
    )
    assert batch.positions.flatten().tolist() == [t for n in lengths for t in range(n)]
    assert torch.equal(batch.segments.positions(), batch.positions.flatten())
    assert batch.real().tolist() == [
        o != "padding" for o, n in zip(batch.owners, lengths) for _ in range(n)
    ]


@torch.no_grad()
def test_the_decoder_uses_the_differences_of_the_positions_it_is_given(model, mixed):
    model.double()
    ids, pixels = torch.from_numpy(mixed[0].ids)[None], normalise(list(mixed[0].images))
    at = torch.arange(ids.shape[1])
    plain = model(ids, pixels)
    close(model(ids, pixels, at + 1000), plain, 1e-9)
    assert (model(ids, pixels, at * 2) - plain).abs().max() > 1e-2


def test_an_empty_document_is_refused():
    with pytest.raises(AssertionError, match="empty document"):
        Segments.of([3, 0, 2])


def test_documents_that_continue_one_are_that_document_with_each_of_them():
    """Keys of the continued document are computed once; none sees its siblings.

    Outputs and all gradients are those of whole copies.
    """
    g = torch.Generator().manual_seed(0)
    lengths, after = [5, 3, 1, 4, 2, 6], (0, 0, 0, 3, 0, 3)  # 1, 2 and 4 continue 0; 5 continues 3
    segments = Segments.of(lengths, after=after)
    assert segments.positions().tolist() == [
        0,
        1,
        2,
        3,
        4,
        5,
        6,
        7,
        5,
        0,
        1,
        2,
        3,
        5,
        6,
        4,
        5,
        6,
        7,
        8,
        9,
    ]
    q, k, v = (
        torch.randn(sum(lengths), heads, 8, generator=g, dtype=torch.float64, requires_grad=True)
        for heads in (4, 2, 2)
    )
    got = packed_attention(q, k, v, segments, causal=True)
    spans = [range(a, b) for a, b in itertools.pairwise(segments.cu.tolist())]
    whole = []
    for i, p in enumerate(after):
        rows = [*(spans[p] if p != i else ()), *spans[i]]
        whole.append(
            packed_attention(*(t[rows] for t in (q, k, v)), Segments.of([len(rows)]), causal=True)[
                -lengths[i] :
            ]
        )
    close(got, torch.cat(whole), 1e-12)
    weight = torch.randn(got.shape, generator=g, dtype=torch.float64)
    for a, b in zip(
        *(
            torch.autograd.grad((out * weight).sum(), (q, k, v), retain_graph=True)
            for out in (got, torch.cat(whole))
        )
    ):
        close(a, b, 1e-12)
    with pytest.raises(AssertionError, match="begins afresh"):
        Segments.of([2, 2, 2], after=(0, 0, 1))
    with pytest.raises(AssertionError, match="causal"):
        packed_attention(q, k, v, segments, causal=False)


@pytest.mark.parametrize("lengths, after", [([4, 4], ()), ([5, 3], ()), ([5, 3], (0, 0))])
def test_attention_runs_in_the_precision_of_autocast(monkeypatch, lengths, after):
    """QK-norm leaves q and k in fp32 beside v in bf16; only half precision reaches flash attention."""
    given, plain = [], attention.sdpa
    monkeypatch.setattr(
        attention,
        "sdpa",
        lambda q, k, v, **how: given.append({q.dtype, k.dtype, v.dtype}) or plain(q, k, v, **how),
    )
    q, k, v = torch.randn(8, 4, 8), torch.randn(8, 2, 8), torch.randn(8, 2, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        packed_attention(q, k, v, Segments.of(lengths, after=after), causal=True)
    assert given and all(dtypes == {torch.bfloat16} for dtypes in given)


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="flash attention over borders needs a CUDA device"
)
@pytest.mark.parametrize("causal, after", [(False, ()), (True, ()), (True, (0, 0, 0, 3, 0, 3))])
def test_packed_attention_on_a_gpu_is_that_of_the_cpu(causal, after):
    g, lengths = torch.Generator().manual_seed(0), [50, 30, 1, 40, 70, 9]
    out = []
    given = [torch.randn(sum(lengths), heads, 64, generator=g) for heads in (4, 2, 2)]
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        q, k, v = (t.to(device, dtype).requires_grad_() for t in given)
        y = packed_attention(q, k, v, Segments.of(lengths, device, after), causal)
        out.append(
            [
                t.float().cpu()
                for t in (y, *torch.autograd.grad(y.float().square().sum(), (q, k, v)))
            ]
        )
    for a, b in zip(*out):
        close(a, b, 0.05)


# -------------------------------------------------------------------- images and their placeholders


@pytest.mark.parametrize("kept", [0, 3, 5])
def test_a_wrong_number_of_images_is_an_error_with_both_numbers(model, mixed, tokenizer, kept):
    batch = collate([[mixed[0], mixed[2]]], None, tokenizer.pad)  # 1 + 3 images of 4 visual tokens
    pixels = torch.cat([batch.images, batch.images])[:kept]
    with pytest.raises(ValueError) as e:
        model(batch.ids, pixels, batch.positions, batch.segments)
    numbers = re.findall(r"\d+", str(e.value))
    assert "16" in numbers and str(4 * kept) in numbers


@torch.no_grad()
def test_visual_tokens_take_the_places_of_the_placeholders_in_order(model, mixed, tokenizer):
    batch = packed(mixed, tokenizer)
    x = model.embed(batch.ids, batch.images)
    holes = batch.ids.flatten() == tokenizer.image
    assert torch.equal(x[holes], model.mlp1(*model.vision_model(batch.images)))
    assert torch.equal(x[~holes], model.language_model.embed(batch.ids.flatten()[~holes]))


def test_a_text_only_batch_gives_the_vision_parameters_zero_gradients_not_none(model, mixed):
    alone(model, mixed[1]).square().mean().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.any() == name.startswith("language_model"), name


def test_touching_the_vision_modules_does_not_change_a_text_only_batch(model, mixed):
    training = alone(model, mixed[1])
    with torch.no_grad():
        assert torch.equal(training, alone(model, mixed[1]))
    for part in (model.vision_model, model.mlp1):
        part.requires_grad_(False)
    alone(model, mixed[1]).mean().backward()
    assert all(
        p.grad is None for part in (model.vision_model, model.mlp1) for p in part.parameters()
    )


# ----------------------------------------------------------------------------------- any resolution


def noise(*sizes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, h, w, generator=generator) for h, w in sizes]


@torch.no_grad()
def test_base_size_images_in_a_list_give_the_bits_of_the_fixed_resolution_path(model, config):
    side = config.vision.image_size
    images = noise(*[(side, side)] * 3)
    table = model.vision_model.position_table(
        side // config.vision.patch_size, side // config.vision.patch_size
    )
    assert torch.equal(table, model.vision_model.preprocessor.pos_embed[0])
    for image in images:
        assert torch.equal(model.vision_model([image])[0], model.vision_model(image[None])[0])
    close(model.vision_model(images)[0], model.vision_model(torch.stack(images))[0])


@pytest.mark.parametrize("position", ["table", "rope2d"])
@torch.no_grad()
def test_images_of_different_sizes_have_together_the_features_they_have_alone(config, position):
    vit = (
        SailVL(replace(config, vision=replace(config.vision, position=position)))
        .init_weights(0)
        .vision_model
    )
    images = noise((32, 32), (16, 64), (48, 32), (80, 96))
    features, grids = vit(images)
    assert grids == [(4, 4), (2, 8), (6, 4), (10, 12)]
    for together, image in zip(features.split([h * w for h, w in grids]), images, strict=True):
        close(together, vit(image[None])[0])


@pytest.fixture(scope="session")
def sizes(config, tokenizer):
    """Four documents with two, one, no and one image, all of different sizes."""
    encoder = Encoder(tokenizer, replace(config, any_resolution=True))
    rng = np.random.default_rng(0)

    def document(*sizes):
        pictures = [
            Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in sizes
        ]
        return encoder(
            Sample((Message("user", (*pictures, "what?")), Message("assistant", ("that",))))
        )

    return [document((40, 70), (100, 33)), document((32, 32)), document(), document((16, 160))]


@torch.no_grad()
def test_packed_documents_of_any_resolution_have_the_logits_they_have_alone(
    model, sizes, tokenizer
):
    batch = collate([sizes[:2], sizes[2:]], None, tokenizer.pad)
    assert isinstance(batch.images, list) and len({i.shape for i in batch.images}) == 4
    for d, together in zip(sizes, logits_of(model, batch), strict=True):
        close(together, alone(model, d))


def test_gradients_of_packed_documents_of_any_resolution_are_the_sum_of_those_alone(
    model, sizes, tokenizer
):
    def gradients(group):
        batch = collate(group, None, tokenizer.pad)
        logits = model(batch.ids, batch.images, batch.positions, batch.segments)
        loss = (
            F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none")
            * batch.weights.flatten()
        )
        return torch.autograd.grad(loss.sum(), list(model.parameters()))

    apart = [gradients([[d]]) for d in sizes]
    for (name, _), g, *parts in zip(
        model.named_parameters(), gradients([sizes[:2], sizes[2:]]), *apart, strict=True
    ):
        assert g.norm() > 0 and (g - sum(parts)).norm() <= 1e-5 * g.norm(), name


@torch.no_grad()
def test_changing_one_image_of_any_resolution_leaves_the_other_documents_bit_identical(
    model, sizes, tokenizer
):
    def logits(group):
        return logits_of(model, collate([group[:2], group[2:]], None, tokenizer.pad))

    before = logits(sizes)
    for i in (0, 1, 3):
        other = replace(sizes[i], images=(255 - sizes[i].images[0], *sizes[i].images[1:]))
        after = logits(sizes[:i] + [other] + sizes[i + 1 :])
        assert [torch.equal(a, b) for a, b in zip(before, after)] == [j != i for j in range(4)]


@torch.no_grad()
def test_the_position_table_is_resized_along_the_right_axes(model, config):
    side = config.vision.image_size // config.vision.patch_size
    rows = (
        torch.arange(side).float().repeat_interleave(side)
    )  # a table that says in which row a patch is
    table = model.vision_model.preprocessor.pos_embed
    table.copy_(rows[None, :, None].expand_as(table))
    resized = model.vision_model.position_table(2 * side, 3 * side).reshape(2 * side, 3 * side, -1)
    close(resized, resized[:, :1, :1].expand_as(resized))
    assert (resized[1:, 0, 0] > resized[:-1, 0, 0]).all()


def test_an_image_of_a_broken_number_of_patches_is_refused(model):
    with pytest.raises(ValueError, match="36x32"):
        model.vision_model(torch.zeros(1, 3, 36, 32))


@pytest.mark.parametrize("grids", [[(3, 4)], [(4, 4), (4, 5)]])
def test_an_odd_grid_is_refused_by_name(grids):
    odd = grids[-1]
    with pytest.raises(ValueError, match=re.escape(str(odd))):
        pixel_shuffle(torch.zeros(sum(h * w for h, w in grids), 2), grids)


@torch.no_grad()
def test_two_dimensional_rope_changes_features_and_sees_only_offsets(config, model):
    vit = (
        SailVL(replace(config, vision=replace(config.vision, position="rope2d")))
        .init_weights(0)
        .vision_model
    )
    image = noise((32, 32))[0][None]
    assert (
        vit(image)[0] - model.vision_model(image)[0]
    ).abs().max() > 1e-2  # the same weights otherwise
    cos, sin = vit.rope([(4, 4)], vit(image)[0].double())
    q, k = (
        torch.randn(1, 1, cos.shape[-1], generator=torch.Generator().manual_seed(i)).double()
        for i in (0, 1)
    )
    score = (rotate(q, cos, sin)[:, 0] @ rotate(k, cos, sin)[:, 0].T).view(
        4, 4, 4, 4
    )  # by row, column of q and of k
    close(score[0, 0, 1, 2], score[2, 1, 3, 3], 1e-12)
    assert len({round(float(score[0, 0, r, c]), 6) for r in range(4) for c in range(4)}) == 16


# --------------------------------------------------------------------------------------------- norm


@pytest.mark.parametrize("shape", [(5, 6), (3, 4, 6), (2, 0, 6)], ids=str)
def test_rms_norm_is_its_definition_and_its_backward_that_of_finite_differences(shape):
    norm, generator = RMSNorm(6, 1e-3).double(), torch.Generator().manual_seed(0)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)
    norm.weight.data.normal_(generator=generator)
    wanted = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight
    close(norm(x), wanted, 1e-12)
    direction = torch.randn(*shape, generator=generator, dtype=torch.float64)
    pairs = (
        torch.autograd.grad((y * direction).sum(), (x, norm.weight)) for y in (norm(x), wanted)
    )
    for got, definition in zip(*pairs, strict=True):
        close(got, definition, 1e-12)
    if x.numel():
        assert torch.autograd.gradcheck(
            lambda x, w: functional_call(norm, {"weight": w}, (x,)), (x, norm.weight)
        )


@pytest.mark.parametrize("name", Elementwise._fields)
def test_what_is_written_out_is_its_definition_with_its_gradients(name):
    """And those of finite differences; the tables of the rotation are constants."""
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(5, 3, 8, generator=g, dtype=torch.float64) for _ in "xy")
    weight = torch.randn(8, generator=g, dtype=torch.float64)
    table = rotary_table(torch.arange(5), 8, 1e4, torch.float64)
    leaves, constants = {
        "rms_norm": ((x, weight), (1e-3,)),
        "swiglu": ((x, y), ()),
        "rotate": ((x,), table),
    }[name]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    found = []
    for functions in (DEFINITIONS, WRITTEN_OUT):
        out = getattr(functions, name)(*leaves, *constants)
        # a transposed gradient: no function may take its layout for granted
        (out.transpose(0, 1) * y.transpose(0, 1)).sum().backward()
        found.append([out, *(leaf.grad for leaf in leaves)])
        for leaf in leaves:
            leaf.grad = None
    with torch.no_grad():
        in_place = getattr(IN_PLACE, name)(*leaves, *constants)
    # scoring without gradients is no other function
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][0], in_place)
    for wanted, got in zip(*found, strict=True):
        close(got, wanted, 1e-12)
    assert torch.autograd.gradcheck(getattr(WRITTEN_OUT, name), (*leaves, *constants))


def test_rms_norm_takes_a_transposed_gradient():
    norm, x = RMSNorm(6, 1e-6), torch.randn(3, 4, 6, requires_grad=True)
    direction = torch.randn(4, 3, 6)
    (norm(x).transpose(0, 1).contiguous() * direction).sum().backward()
    got, x.grad = x.grad, None
    (norm(x) * direction.transpose(0, 1).contiguous()).sum().backward()
    close(got, x.grad)


def test_rms_norm_in_half_precision_takes_its_statistic_in_single_precision():
    norm, generator = RMSNorm(64, 1e-6).bfloat16(), torch.Generator().manual_seed(0)
    x = (torch.randn(9, 64, generator=generator) * 30).bfloat16()
    norm.weight.data.uniform_(0.5, 2, generator=generator)
    wide = x.float()
    exact = (wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt()).bfloat16() * norm.weight
    assert norm(x).dtype == torch.bfloat16 and torch.equal(norm(x), exact)


# ------------------------------------------------------------------------------- adapter, log-probs


def test_pixel_shuffle_merges_neighbours_in_reading_order():
    cells = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    patches = torch.arange(16)[:, None]
    assert pixel_shuffle(patches, [(4, 4)]).tolist() == cells
    two = torch.cat([patches, 100 + patches])
    assert pixel_shuffle(two, [(4, 4)] * 2).tolist() == cells + [
        [100 + i for i in row] for row in cells
    ]
    wide = torch.cat(
        [patches, torch.arange(16, 24)[:, None]]
    )  # and a second image of 2 x 4 patches
    assert pixel_shuffle(wide, [(4, 4), (2, 4)]).tolist() == cells + [
        [16, 17, 20, 21],
        [18, 19, 22, 23],
    ]
    channels = pixel_shuffle(torch.stack([patches[:, 0], -patches[:, 0]], 1), [(4, 4)])
    assert channels[0].tolist() == [0, 0, 1, -1, 4, -4, 5, -5]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_in_chunks_are_those_of_one_softmax_with_their_gradients(temperature):
    generator = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(n, 16, generator=generator, requires_grad=True) for n in (11, 50))
    labels = torch.randint(50, (11,), generator=generator)
    direction = torch.randn(11, generator=generator)

    def with_gradients(logp):
        return logp, *torch.autograd.grad((logp * direction).sum(), (hidden, head))

    wanted = with_gradients(
        ((hidden @ head.T) / temperature).log_softmax(-1)[torch.arange(11), labels]
    )
    for chunk in (4, 11, 4096):
        got = with_gradients(token_logprobs(hidden, head, labels, temperature, chunk))
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_chunks_under_bf16_autocast_give_fp32_gradients_that_are_nearly_those_of_whole_logits():
    g = torch.Generator().manual_seed(0)
    found = []
    for chunk in (5, 4096):
        hidden, head = (
            torch.randn(n, 16, generator=g.manual_seed(n)).requires_grad_() for n in (12, 40)
        )
        with torch.autocast("cpu", torch.bfloat16):
            logprobs = token_logprobs(hidden, head, torch.arange(12), 1.0, chunk)
        logprobs.mul(torch.linspace(-1, 1, 12)).sum().backward()
        found.append((logprobs, hidden.grad, head.grad))
    for a, b in zip(*found):
        assert a.dtype == torch.float32 and (a - b).norm() < 0.02 * b.norm()


def test_a_frozen_head_gets_no_gradient_from_chunks():
    hidden, head = torch.randn(12, 16, requires_grad=True), torch.randn(40, 16)
    token_logprobs(hidden, head, torch.arange(12), 1.0, 5).sum().backward()
    assert hidden.grad.abs().sum() > 0 and head.grad is None


@pytest.mark.parametrize("preset", ["toy", "toy-moe"])
@pytest.mark.parametrize("recompute", [False, True])
def test_hidden_states_at_some_positions_are_those_of_all(preset, recompute):
    """And their gradients, for none as well; a router's last layer sees all tokens either way."""
    config = replace(PRESETS[preset].text, num_hidden_layers=2)
    llm = LLM(config).double()
    llm.init_weights(torch.Generator().manual_seed(0))
    llm.recompute = recompute
    segments = Segments.of([5, 9, 2])
    attend = attention.attend_inside(segments, causal=True)
    x = torch.randn(16, config.hidden_size, dtype=torch.float64)

    for at in (torch.tensor([1, 4, 5, 13, 15]), torch.tensor([], dtype=torch.int64)):
        found = []
        for asked in (None, at):
            routing = moe.Decisions() if config.num_experts else None
            hidden = llm(x, segments.positions(), attend, routing, asked)
            hidden = hidden[at] if asked is None else hidden
            gradients = torch.autograd.grad(hidden.square().sum(), [*llm.model.layers.parameters()])
            found.append((hidden, *gradients))
            assert not routing or all(len(layer.indices) == 16 for layer in routing)
        assert found[1][0].shape == (len(at), config.hidden_size)
        for wanted, got in zip(*found, strict=True):
            close(got, wanted, 1e-12)


def test_log_probabilities_are_of_the_labels_at_the_asked_positions(model, mixed, tokenizer):
    batch = packed(mixed, tokenizer)
    at = (batch.labels.flatten() >= 0).nonzero()[:, 0]
    labels = batch.labels.flatten()[at]
    with torch.no_grad():
        got = model.logprobs(
            batch.ids, batch.images, batch.positions, batch.segments, at, labels, 0.5
        )
        logits = model(batch.ids, batch.images, batch.positions, batch.segments).flatten(0, 1)
    close(got, (logits / 0.5).log_softmax(-1)[at, labels])


# ----------------------------------------------------------------------------------- strict loading


@pytest.fixture
def saved(model, tmp_path):
    model.save_pretrained(tmp_path)
    return tmp_path


NAME = "vision_model.trunk.blocks.0.mlp.fc1.weight"


@pytest.mark.parametrize(
    "damage",
    [
        lambda t: t.pop(NAME),
        lambda t: t.__setitem__(NAME, t[NAME][:-1].clone()),
        lambda t: t.__setitem__(NAME, t[NAME].T.contiguous()),
        lambda t: t.__setitem__(NAME, t[NAME].to(torch.int64)),
    ],
    ids=["missing", "short", "transposed", "integers"],
)
def test_a_tensor_that_does_not_fit_is_an_error_that_names_it(saved, damage):
    tensors = load_file(saved / "model.safetensors")
    damage(tensors)
    save_file(tensors, saved / "model.safetensors")
    with pytest.raises(ValueError, match=re.escape(NAME)):
        SailVL.from_pretrained(saved)


def test_a_tensor_that_nobody_asked_for_is_an_error_that_names_it(saved):
    tensors = load_file(saved / "model.safetensors") | {"vision_model.surprise": torch.zeros(1)}
    save_file(tensors, saved / "model.safetensors")
    with pytest.raises(ValueError, match="vision_model.surprise"):
        SailVL.from_pretrained(saved)


@pytest.mark.parametrize("left", [0.0, 0.001, 0.5, 0.9999])
def test_a_truncated_file_is_an_error_that_names_it(saved, left):
    file = saved / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * left)])
    with pytest.raises(ValueError, match="model.safetensors: truncated"):
        SailVL.from_pretrained(saved)


def test_a_missing_file_is_an_error_that_names_it(saved):
    (saved / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="model.safetensors: missing"):
        SailVL.from_pretrained(saved)


@pytest.mark.parametrize("read", [SailVL.from_pretrained, weights.locate])
def test_a_directory_without_config_is_an_error_that_names_it(saved, read):
    (saved / "config.json").unlink()
    with pytest.raises(ValueError, match="config.json"):
        read(saved)


@pytest.mark.parametrize(
    "text", ["{", "[1]", '{"vision_config": {}}', '{"vision_config": {"hidden_size": 8}}']
)
def test_a_config_that_is_no_configuration_is_an_error_that_names_it(saved, text):
    (saved / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json"):
        SailVL.from_pretrained(saved)


@pytest.mark.parametrize("relative", [True, False])
def test_an_index_cannot_lead_out_of_its_directory(saved, relative):
    outside = saved / "model"
    outside.mkdir()
    for file in ("config.json", "model.safetensors"):
        shutil.move(saved / file, outside / file)
    (saved / "elsewhere").mkdir()
    index = saved / "elsewhere" / weights.INDEX
    shutil.copy(outside / "config.json", saved / "elsewhere")
    target = "../model/model.safetensors" if relative else str(outside / "model.safetensors")
    index.write_text(
        json.dumps({"weight_map": dict.fromkeys(load_file(outside / "model.safetensors"), target)})
    )
    with pytest.raises(ValueError, match="outside"):
        SailVL.from_pretrained(saved / "elsewhere")


def test_an_index_that_disagrees_with_the_files_is_an_error_that_names_the_tensor(model, tmp_path):
    weights.save_weights(model, tmp_path, model.config.to_dict(), shard_bytes=1 << 20)
    index = json.loads((tmp_path / weights.INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"][NAME] = next(f for f in files if f != index["weight_map"][NAME])
    (tmp_path / weights.INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=re.escape(NAME)):
        SailVL.from_pretrained(tmp_path)


def test_a_tensor_in_two_files_is_an_error_that_names_it(model, tmp_path):
    weights.save_weights(model, tmp_path, model.config.to_dict(), shard_bytes=1 << 20)
    for file in sorted(tmp_path.glob("*.safetensors"))[:2]:
        save_file(load_file(file) | {NAME: torch.zeros(256, 96)}, file)
    with pytest.raises(ValueError, match=re.escape(NAME) + " is already in"):
        SailVL.from_pretrained(tmp_path)


def test_a_saved_model_comes_back_bit_equal_and_in_the_asked_type(model, saved):
    ours, half = (
        dict(model.named_parameters()),
        dict(SailVL.from_pretrained(saved, torch.bfloat16).named_parameters()),
    )
    again = dict(SailVL.from_pretrained(saved).named_parameters())
    assert ours.keys() == again.keys() == half.keys()
    assert all(
        torch.equal(p, again[n]) and torch.equal(p.bfloat16(), half[n]) for n, p in ours.items()
    )
    assert SailVL.from_pretrained(saved).config == model.config


@pytest.fixture
def tied(config):
    return SailVL(
        replace(config, text=replace(config.text, tie_word_embeddings=True))
    ).init_weights(0)


def test_a_tied_checkpoint_may_leave_the_head_out(tied, tmp_path):
    assert tied.language_model.lm_head.weight is tied.language_model.model.embed_tokens.weight
    tied.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("language_model.lm_head.weight", None)
    save_file(tensors, tmp_path / "model.safetensors")
    llm = SailVL.from_pretrained(tmp_path).language_model
    assert llm.lm_head.weight is llm.model.embed_tokens.weight
    assert torch.equal(llm.lm_head.weight, tied.language_model.model.embed_tokens.weight)


def test_a_tied_head_is_still_tied_after_saving_and_loading(tied, tmp_path):
    tied.save_pretrained(tmp_path)
    again = SailVL.from_pretrained(tmp_path)
    assert again.language_model.lm_head.weight is again.language_model.model.embed_tokens.weight
    assert again.config == tied.config


def test_a_released_head_of_its_own_is_believed_although_the_config_says_tied(model, saved):
    config = json.loads((saved / "config.json").read_text())
    config["llm_config"]["tie_word_embeddings"] = True  # as in the released 2B
    config.pop("nanosail")
    (saved / "config.json").write_text(json.dumps(config))
    ours, again = model.language_model, SailVL.from_pretrained(saved).language_model
    assert torch.equal(again.lm_head.weight, ours.lm_head.weight)
    assert torch.equal(again.model.embed_tokens.weight, ours.model.embed_tokens.weight)


def test_saving_over_an_earlier_checkpoint_replaces_it(model, config, tmp_path):
    weights.save_weights(
        SailVL(config).init_weights(1), tmp_path, config.to_dict(), shard_bytes=1 << 20
    )
    model.save_pretrained(tmp_path)
    ours = dict(model.named_parameters())
    assert all(
        torch.equal(p, ours[n]) for n, p in SailVL.from_pretrained(tmp_path).named_parameters()
    )


@pytest.mark.parametrize(
    "where", [None, ["model.safetensors"], {"a": ["x"]}, {"a": 1, "b": "x"}], ids=str
)
def test_an_index_that_maps_no_names_to_files_is_an_error_that_names_it(saved, where):
    (saved / weights.INDEX).write_text(json.dumps({"weight_map": where}))
    with pytest.raises(ValueError, match=weights.INDEX):
        SailVL.from_pretrained(saved)
