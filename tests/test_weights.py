"""Parts read and joined, memory while loading, and directories that are broken or mean harm."""

import json
import pickle
import random
import re
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file

import llm
import vit
import vlm
from generate import load_model
from infra import weights
from llm import LLM, LLMConfig
from vit import ViT, ViTConfig, transformers_names
from vlm import PRESETS, SailVL, VLMConfig

TEXT = replace(PRESETS["toy"].text, num_hidden_layers=1)
MOE = replace(PRESETS["toy-moe"].text, num_hidden_layers=1)
VISION = replace(PRESETS["toy"].vision, num_hidden_layers=1)


def random_weights(model):
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    return model


@pytest.fixture
def text(tmp_path):
    random_weights(LLM(TEXT)).save_pretrained(tmp_path / "text")
    return tmp_path / "text"


@pytest.fixture
def vision(tmp_path):
    random_weights(ViT(VISION)).save_pretrained(tmp_path / "vision")
    return tmp_path / "vision"


def rewrite(directory, change, file="config.json"):
    """Change a JSON file of a directory in place."""
    values = json.loads((directory / file).read_text())
    change(values)
    (directory / file).write_text(json.dumps(values))


def equal(a, b):
    a, b = dict(a.named_parameters()), dict(b.named_parameters())
    return a.keys() == b.keys() and all(torch.equal(p, b[n]) for n, p in a.items())


# -------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize(
    "config",
    [TEXT, MOE, replace(TEXT, tie_word_embeddings=True), replace(TEXT, qk_norm=False)],
    ids=["dense", "moe", "tied", "llama"],
)
def test_a_language_model_comes_back_from_disk(config, tmp_path):
    model = random_weights(LLM(config))
    model.save_pretrained(tmp_path)
    again = LLM.from_pretrained(tmp_path)
    assert again.config == config and equal(model, again)
    stored = load_file(tmp_path / "model.safetensors")
    assert not any("gate_up" in name for name in stored)
    assert ("lm_head.weight" in stored) != config.tie_word_embeddings
    assert sum(t.numel() for t in stored.values()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("config", [TEXT, MOE], ids=["norms", "experts"])
def test_a_llama_has_no_norms_of_queries_and_no_experts(config, tmp_path):
    """What is not built is refused by name, not read half."""
    random_weights(LLM(config)).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda c: c.update(model_type="llama"))
    with pytest.raises(ValueError, match="k_norm|llama of 8 experts"):
        LLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("position", ["table", "rope2d", "sincos"])
@pytest.mark.parametrize("layout", [None, transformers_names])
@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_a_vit_comes_back_from_every_published_spelling(position, layout, prefix, tmp_path):
    config = replace(VISION, position=position)
    model = random_weights(ViT(config))
    weights.save_weights(
        model,
        tmp_path,
        config.to_dict(),
        layout=lambda name, p: {
            prefix + n: v for n, v in (layout(name, p) if layout else {name: p}).items()
        },
    )
    again = ViT.from_pretrained(tmp_path)
    assert again.config == config and equal(model, again)


@pytest.mark.parametrize("equal_head", [True, False])
def test_a_head_stored_beside_a_tied_embedding_is_tied_only_when_it_is_the_same(
    equal_head, tmp_path
):
    model = random_weights(LLM(TEXT))  # Qwen3-0.6B is published with both
    if equal_head:
        model.lm_head.weight.data.copy_(model.model.embed_tokens.weight)
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda c: c.update(tie_word_embeddings=True))
    again = LLM.from_pretrained(tmp_path)
    assert (
        (again.lm_head.weight is again.model.embed_tokens.weight)
        == again.config.tie_word_embeddings
        == equal_head
    )
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_parts_make_a_model_with_a_fresh_adapter_of_the_embeddings_size(vision, text):
    model = SailVL.from_parts(vision, text, any_resolution=True, image_token_id=7)
    assert equal(model.vision_model, ViT.from_pretrained(vision)) and equal(
        model.language_model, LLM.from_pretrained(text)
    )
    assert (
        model.config == VLMConfig(VISION, TEXT, any_resolution=True, image_token_id=7)
        and model.image_token_id == 7
    )
    assert equal(model.mlp1, SailVL.from_parts(vision, text).mlp1)
    assert not equal(model.mlp1, SailVL.from_parts(vision, text, seed=1).mlp1)
    ids = torch.tensor([[1, 2, 7, 7, 7, 7]])
    with torch.no_grad():
        out = model.mlp1(torch.randn(800, VISION.hidden_size), [(20, 40)])
        assert model(ids, torch.randn(1, 3, 32, 32)).shape == (1, 6, TEXT.vocab_size)
    embeddings = model.language_model.model.embed_tokens.weight.detach()
    assert 0.2 < float(out.square().mean().sqrt() / embeddings.square().mean().sqrt()) < 2
    half = SailVL.from_parts(vision, text, torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_the_command_joins_parts_with_the_tokenizer_and_the_result_loads(
    vision, text, tokenizer, tmp_path, capsys
):
    tokenizer.save(text)
    assert vlm.join_parts(vlm.JoinOptions(vision, text, tmp_path / "out")) is None
    model, words = load_model(tmp_path / "out")
    assert words.ranks == tokenizer.ranks and model.image_token_id == tokenizer.image
    assert equal(model.language_model, LLM.from_pretrained(text, torch.bfloat16).float())
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in capsys.readouterr().out


def test_tiles_are_cut_as_the_released_processor_says(vision, text, tmp_path):
    SailVL.from_parts(vision, text).save_pretrained(tmp_path)
    rewrite(
        tmp_path, lambda c: c.pop("nanosail")
    )  # a released directory: 12 there, 10 here, and the tiler obeys this one
    rewrite(tmp_path, lambda c: c.update(max_dynamic_patch=12))
    assert SailVL.from_pretrained(tmp_path).config.max_tiles == 12
    (tmp_path / "preprocessor_config.json").write_text(
        '{"max_dynamic_patch": 10, "use_msac": true}'
    )
    config = SailVL.from_pretrained(tmp_path).config
    assert config.max_tiles == 10 and config.msac


# ------------------------------------------------------------------------------------------- memory

MEASURE = """
import sys, torch
from llm import LLM
def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
LLM.from_pretrained(sys.argv[1])  # warm
open("/proc/self/clear_refs", "w").write("5")
before = peak()
model = LLM.from_pretrained(sys.argv[2], torch.bfloat16)
sizes = [p.nbytes for p in model.parameters()]
print(peak() - before, sum(sizes), max(sizes))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").is_file(),
    reason="the kernel's own count of peak memory is Linux's",
)
def test_loading_needs_the_model_and_its_largest_tensor(text, tmp_path):
    """The file holds fp32 and the model bf16: a tensor as it is read counts twice its size.

    Measured by the kernel.
    """
    config = replace(
        TEXT, vocab_size=20_000, hidden_size=512, intermediate_size=4096, num_hidden_layers=4
    )
    LLM(config).save_pretrained(tmp_path / "large")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(text), str(tmp_path / "large")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    peak, total, largest = map(int, done.stdout.split())
    assert 90e6 < total <= peak + 8e6
    assert peak <= total + 2 * largest + 16e6, (peak, total, largest)


def test_saving_holds_one_shard_at_a_time(tmp_path, monkeypatch):
    sizes = []
    monkeypatch.setattr(
        weights,
        "save_file",
        lambda shard, *how, **more: (
            sizes.append(sum(t.nbytes for t in shard.values())),
            save_file(shard, *how, **more),
        ),
    )
    model = random_weights(LLM(TEXT))
    weights.save_weights(model, tmp_path, TEXT.to_dict(), 1 << 18)
    largest = max(p.nbytes for p in model.parameters())
    assert len(sizes) > 3 and max(sizes) <= max(largest, 1 << 18)
    assert equal(model, LLM.from_pretrained(tmp_path))


def test_a_smaller_checkpoint_leaves_nothing_of_a_larger_one(tmp_path):
    model, other = random_weights(LLM(TEXT)), random_weights(LLM(TEXT))
    (tmp_path / "notes.txt").write_text("mine")
    for shard_bytes in (1 << 18, 1 << 19, 1 << 40, 1 << 18):
        weights.save_weights(model, tmp_path, TEXT.to_dict(), shard_bytes)
        model, other = other, model
        files = {p.name for p in tmp_path.iterdir()} - {"notes.txt", "config.json", weights.INDEX}
        assert files == {p.name for p in set(weights.locate(tmp_path).values())}
        assert equal(other, LLM.from_pretrained(tmp_path))
    assert (tmp_path / "notes.txt").read_text() == "mine"


# -------------------------------------------------------------------------------- broken or hostile


@pytest.mark.parametrize("key", list(LLMConfig.__dataclass_fields__)[:10])
def test_a_missing_key_of_a_language_model_is_an_error_that_names_it(text, key):
    rewrite(text, lambda c: c.pop(key))
    with pytest.raises(ValueError, match=f"config.json: key {key} is missing"):
        LLM.from_pretrained(text)


@pytest.mark.parametrize("key", ["num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"])
def test_a_missing_key_of_a_mixture_is_an_error_that_names_it(key, tmp_path):
    LLM(MOE).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda c: c.pop(key))
    with pytest.raises(ValueError, match=key):
        LLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("key", [k for k in ViTConfig.__dataclass_fields__ if k != "position"])
def test_a_missing_key_of_a_vit_is_an_error_that_names_it(vision, key):
    rewrite(vision, lambda c: c.pop(key))
    with pytest.raises(ValueError, match=f"config.json: key {key} is missing"):
        ViT.from_pretrained(vision)


@pytest.mark.parametrize(
    "key, value",
    [
        ("hidden_size", "128"),
        ("hidden_size", -1),
        ("hidden_size", 0),
        ("hidden_size", 128.0),
        ("hidden_size", True),
        ("hidden_size", [128]),
        ("num_hidden_layers", 10**9),
        ("vocab_size", 10**12),
        ("num_experts", 10**9),
        ("rms_norm_eps", float("nan")),
        ("rope_theta", -1e4),
        ("rope_theta", "1e4"),
        ("tie_word_embeddings", 1),
        ("head_dim", 33),
        ("num_key_value_heads", 3),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("rope_scaling", {"type": "yarn"}),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}),
        ("model_type", "mistral"),
        ("mlp_bias", True),
        ("pretraining_tp", 2),
        ("model_type", ["qwen3"]),
        ("use_sliding_window", True),
        ("mlp_only_layers", [0]),
        ("decoder_sparse_step", 2),
    ],
)
def test_a_senseless_or_unsupported_value_is_an_error_before_anything_is_built(text, key, value):
    rewrite(text, lambda c: c.update({key: value}))
    with pytest.raises(ValueError, match="config.json: "):
        LLM.from_pretrained(text)


@pytest.mark.parametrize(
    "key, value",
    [
        ("num_attention_heads", 5),
        ("patch_size", 7),
        ("position", "learned"),
        ("use_head", True),
        ("qkv_bias", True),
        ("image_size", [32, 32]),
        ("hidden_act", "gelu"),
        ("model_type", "siglip_vision_model"),
    ],
)
def test_a_vit_that_we_do_not_build_is_an_error(vision, key, value):
    rewrite(vision, lambda c: c.update({key: value}))
    with pytest.raises(ValueError, match="config.json: "):
        ViT.from_pretrained(vision)


@pytest.mark.parametrize(
    "config",
    [
        "[" * 100_000,
        '{"a": 1, "a": 2}',
        "\xff",
        "{" + '"a": {' * 5000,
        "null",
        '{"vision_config": 3, "llm_config": 4}',
    ],
)
@pytest.mark.parametrize("read", [LLM.from_pretrained, ViT.from_pretrained, SailVL.from_pretrained])
def test_a_file_that_is_no_config_is_an_error_that_names_it(text, config, read):
    (text / "config.json").write_bytes(config.encode("latin-1"))
    with pytest.raises(ValueError, match="config.json"):
        read(text)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "consolidated.pth", "model.safetensors"]
)
def test_a_pickle_is_never_opened(text, name):
    class Harm:
        def __reduce__(self):
            return Path.write_text, (text / "harmed", "you were harmed")

    content = pickle.dumps(Harm())
    (text / "model.safetensors").unlink()
    (text / name).write_bytes(content)
    with pytest.raises(
        ValueError,
        match="not a safetensors file" if name == "model.safetensors" else f"{name} is a pickle",
    ):
        LLM.from_pretrained(text)
    assert not (text / "harmed").exists()
    pickle.loads(content)
    assert (text / "harmed").exists()  # it would have harmed


def with_header(header: bytes, body: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + body


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 8,
        struct.pack("<Q", 1 << 62) + b"{}",
        with_header(b"{", b""),
        with_header(b"[]", b""),
        with_header(
            b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}',
            b"\0" * 4,
        ),
        with_header(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', b"\0" * 4),
        with_header(b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', b"\0" * 4),
        with_header(b'{"a":{"dtype":"F32","shape":[-1,-1],"data_offsets":[0,4]}}', b"\0" * 4),
        with_header(
            b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}', b""
        ),
        with_header(
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
            b"\0" * 4,
        ),
        with_header(
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
            b"\0" * 4,
        ),
    ],
)
def test_a_header_that_lies_is_an_error_that_names_the_file(text, content):
    (text / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="model.safetensors: "):
        LLM.from_pretrained(text)


@pytest.mark.parametrize(
    "change",
    [
        lambda i: i["weight_map"].update({"model.norm.weight": "/etc/passwd"}),
        lambda i: i["weight_map"].update({"model.norm.weight": "../text/model.safetensors"}),
        lambda i: i["weight_map"].update({"model.norm.weight": "."}),
        lambda i: i["weight_map"].update({"model.norm.weight": "gone.safetensors"}),
        lambda i: i["weight_map"].update({"ghost.weight": min(i["weight_map"].values())}),
        lambda i: i["weight_map"].pop("model.norm.weight"),
        lambda i: i["weight_map"].update({"model.norm.weight": "a\0b"}),
        lambda i: i["weight_map"].update({"model.norm.weight": "\ud800"}),
        lambda i: i["weight_map"].update({"model.norm.weight": 300 * "a"}),
        lambda i: i["weight_map"].update({"model.norm.weight": ""}),
        lambda i: i.update(weight_map={}),
    ],
)
def test_an_index_that_lies_is_an_error(text, change):
    weights.save_weights(LLM(TEXT), text, TEXT.to_dict(), 1 << 18)
    rewrite(text, change, weights.INDEX)
    with pytest.raises(ValueError, match=re.escape(str(text))):
        LLM.from_pretrained(text)


@pytest.mark.parametrize(
    "fault, message",
    [
        ("cut", "truncated"),
        ("twice", "tensor .* is already in"),
        ("gone", "missing"),
        ("emptied", "truncated"),
        ("foreign", "1 tensor.s. not used by this model, first extra"),
    ],
)
def test_a_faulty_shard_is_an_error_and_the_model_stays_empty(text, fault, message):
    """In the last of several shards: the ones before it must not have been loaded."""
    weights.save_weights(LLM(TEXT), text, TEXT.to_dict(), 1 << 18)
    first, *_, last = sorted(text.glob("model-*.safetensors"))
    if fault == "cut":
        last.write_bytes(last.read_bytes()[:-1])
    elif fault == "emptied":
        last.write_bytes(b"")
    elif fault == "gone":
        last.unlink()
    else:
        save_file(
            load_file(last) | (load_file(first) if fault == "twice" else {"extra": torch.zeros(2)}),
            last,
        )
        if fault == "foreign":
            rewrite(text, lambda i: i["weight_map"].update(extra=last.name), weights.INDEX)
    with torch.device("meta"):
        model = LLM(TEXT)
    with pytest.raises(
        ValueError, match=f"{re.escape(str(text if fault == 'foreign' else last))}: {message}"
    ):
        weights.load_weights(model, text)
    assert all(p.is_meta for p in model.parameters())


def test_a_link_inside_the_directory_is_followed(text):
    file = text / "model.safetensors"
    model = LLM.from_pretrained(text)
    file.rename(text / "blob")
    file.symlink_to(text / "blob")
    assert equal(LLM.from_pretrained(text), model)
    (text.parent / "elsewhere").symlink_to(text)  # the directory itself is what the user named
    assert equal(LLM.from_pretrained(text.parent / "elsewhere"), model)


@pytest.mark.parametrize("target", ["/etc/passwd", "/dev/zero", "../secret.safetensors"])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", weights.INDEX])
def test_a_link_out_of_the_directory_is_an_error_that_names_target_and_way_out(text, target, name):
    (text.parent / "secret.safetensors").write_bytes((text / "model.safetensors").read_bytes())
    (text / name).unlink(missing_ok=True)
    (text / name).symlink_to(target)
    wanted = f"{name}: a link out of .*{Path(target).name}.*NANOSAIL_FOLLOW_LINKS=1"
    with pytest.raises(ValueError, match=wanted):
        LLM.from_pretrained(text)


def test_a_link_out_of_the_directory_is_followed_where_the_user_says_so(text, monkeypatch):
    model = LLM.from_pretrained(text)
    file = text / "model.safetensors"
    file.rename(text.parent / "shared.safetensors")
    file.symlink_to(text.parent / "shared.safetensors")
    monkeypatch.setenv("NANOSAIL_FOLLOW_LINKS", "1")
    assert equal(LLM.from_pretrained(text), model)


@pytest.mark.parametrize("target", ["gone", "model.safetensors"])
def test_a_link_to_nothing_or_to_itself_is_a_missing_file(text, target):
    (text / "model.safetensors").unlink()
    (text / "model.safetensors").symlink_to(target)
    with pytest.raises(ValueError, match="model.safetensors: missing"):
        LLM.from_pretrained(text)


def hub_cache(text: Path, root: Path) -> Path:
    """The files of a model as the Hugging Face hub keeps them: links into the repository's blobs."""
    snapshot = root / "models--some--model" / "snapshots" / "0123abc"
    blobs = snapshot.parents[1] / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(text.iterdir())):
        (blobs / f"{number:064x}").write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{number:064x}")
    return snapshot


def test_the_cache_of_the_hub_is_read_and_only_its_own_blobs(text, tmp_path):
    snapshot = hub_cache(text, tmp_path / "hub")
    assert equal(LLM.from_pretrained(snapshot), LLM.from_pretrained(text))

    other = hub_cache(text, tmp_path / "other")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(other / "model.safetensors")
    with pytest.raises(ValueError, match="a link out of the model's directory"):
        LLM.from_pretrained(snapshot)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["first", "last", "everywhere"])
def test_a_weight_that_is_no_finite_number_is_an_error_that_names_its_tensor(text, value, where):
    stored = load_file(text / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    part = {"first": slice(0, 1), "last": slice(-1, None), "everywhere": slice(None)}[where]
    stored[name].view(-1)[part] = value
    save_file(stored, text / "model.safetensors")
    with pytest.raises(ValueError, match=f"{re.escape(name)} holds values that are not finite"):
        LLM.from_pretrained(text)


def test_a_weight_that_becomes_infinite_in_the_asked_type_is_an_error(text):
    stored = load_file(text / "model.safetensors")
    stored["model.norm.weight"][0] = 1e6
    save_file(stored, text / "model.safetensors")
    LLM.from_pretrained(text, torch.bfloat16)
    with pytest.raises(ValueError, match="model.norm.weight .* torch.float16"):
        LLM.from_pretrained(text, torch.float16)


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_hidden_layers": 1024, "num_experts": 4096},
        {"hidden_size": 2**20, "num_attention_heads": 2**20, "head_dim": 2**20},
        {"hidden_size": 2**20, "moe_intermediate_size": 2**20, "num_experts": 64},
    ],
)
def test_sizes_that_are_absurd_together_are_refused_before_anything_is_built(
    sizes, tmp_path, monkeypatch
):
    LLM(MOE).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda c: c.update(sizes))
    monkeypatch.setattr(llm, "LLM", None)  # building would fail
    with pytest.raises(ValueError, match="config.json: .* are believed"):
        LLM.from_pretrained(tmp_path)


def test_a_position_table_of_absurd_size_is_refused_before_anything_is_built(vision, monkeypatch):
    rewrite(vision, lambda c: c.update(image_size=2**20, patch_size=1))
    monkeypatch.setattr(vit, "ViT", None)
    with pytest.raises(ValueError, match="config.json: .* are believed"):
        ViT.from_pretrained(vision)


def test_the_largest_published_shapes_are_believed():
    kimi = {"num_hidden_layers": 61, "num_experts": 384, "hidden_size": 7168, "head_dim": 128}
    values = MOE.to_dict() | kimi | {"moe_intermediate_size": 2048, "vocab_size": 163840}
    assert LLMConfig.from_dict(values).num_experts == 384


def test_a_config_of_absurd_size_is_refused_before_it_is_read(text):
    with open(text / "config.json", "ab") as file:
        file.truncate(2**28 + 1)  # a hole: it takes no room on the disk
    with pytest.raises(ValueError, match="config.json: 268,435,457 bytes"):
        LLM.from_pretrained(text)


JUNK = [None, True, 0, -1, 1, 3, 1.5, 2**20, 10**30, float("nan"), "", "2", "\ud800", [], [[]], {}]


@pytest.mark.parametrize("seed", range(4))
def test_a_config_of_wrong_types_is_one_line_that_names_file_and_key_or_a_model(seed):
    """Whatever stands in it: read, built (on no memory), or a ValueError."""
    rng = random.Random(seed)
    whole = PRESETS["toy-moe"].to_dict()
    for _ in range(300):
        values = json.loads(json.dumps(whole))
        part = rng.choice(
            [values, values["llm_config"], values["vision_config"], values["nanosail"]]
        )
        for key in rng.sample(list(part), rng.choice([1, 1, 2])):
            part[key] = rng.choice(JUNK)
        processor = rng.choice([None, {"max_dynamic_patch": rng.choice(JUNK)}])
        try:
            config = VLMConfig.from_dict(values, processor, "some/config.json")
        except ValueError as error:
            assert str(error).startswith("some/config.json: ") and "\n" not in str(error)
        else:
            with torch.device("meta"):
                SailVL(config)


def test_a_router_that_could_not_learn_is_an_error_before_anything_is_built(tmp_path):
    LLM(MOE).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda c: c.update(num_experts_per_tok=1))
    with pytest.raises(ValueError, match="config.json: num_experts_per_tok 1 with norm_topk_prob"):
        LLM.from_pretrained(tmp_path)


def test_a_tokenizer_that_the_model_has_no_embeddings_for_is_an_error_with_both_sizes(
    vision, text, tokenizer, tmp_path
):
    size = TEXT.vocab_size
    config = VLMConfig(VISION, TEXT)
    vlm.check_vocabulary(config, size, "some/model")  # vocabularies are rounded up
    vlm.check_vocabulary(config, 10, "some/model")
    with pytest.raises(ValueError, match=f"some/model: .* {size + 1} tokens, .* {size}"):
        vlm.check_vocabulary(config, size + 1, "some/model")

    small = tmp_path / "small"
    LLM(replace(TEXT, vocab_size=len(tokenizer) - 1)).save_pretrained(small)
    tokenizer.save(small)
    with pytest.raises(ValueError, match="do not belong together"):
        vlm.join_parts(vlm.JoinOptions(vision, small, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "part, key, value",
    [
        ((), "model_type", "internvl_chat"),
        ((), "downsample_ratio", 0.25),
        ((), "vision_config", None),
        (("llm_config",), "model_type", "mistral"),
        (("vision_config",), "hidden_act", "gelu"),
        (("nanosail",), "max_tiles", "ten"),
        (("nanosail",), "image_token_id", -1),
    ],
)
def test_a_vlm_that_we_do_not_build_is_an_error_that_names_the_file(
    vision, text, tmp_path, part, key, value
):
    SailVL.from_parts(vision, text).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda c: (c[part[0]] if part else c).update({key: value}))
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/config.json: ")):
        SailVL.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["int8", "int64", "bool", "float8_e4m3fn", "complex64"])
def test_a_tensor_of_another_kind_is_an_error_that_names_it(text, kind):
    stored = load_file(text / "model.safetensors")
    save_file(
        stored | {"model.norm.weight": stored["model.norm.weight"].to(getattr(torch, kind))},
        text / "model.safetensors",
    )
    with pytest.raises(ValueError, match="model.norm.weight has type"):
        LLM.from_pretrained(text)


def test_nothing_is_read_and_no_memory_taken_before_every_name_and_shape_was_checked(
    text, monkeypatch
):
    """The last tensor in order is wrong: the model must still be empty and the others unread."""
    stored = load_file(text / "model.safetensors")
    last = sorted(stored)[-1]
    save_file(stored | {last: stored[last][..., :-1].contiguous()}, text / "model.safetensors")
    with torch.device("meta"):
        model = LLM(TEXT)
    with pytest.raises(ValueError, match=re.escape(last)):
        weights.load_weights(model, text)
    assert all(p.is_meta for p in model.parameters())


def test_a_live_model_is_left_as_it_was_by_a_directory_that_does_not_fit(text):
    model = random_weights(LLM(TEXT))
    before = {name: p.clone() for name, p in model.named_parameters()}
    (text / "model.safetensors").write_bytes((text / "model.safetensors").read_bytes()[:-8])
    with pytest.raises(ValueError, match="truncated"):
        weights.load_weights(model, text)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_any_byte_of_a_header_changed_is_an_error_or_the_same_model(text):
    """A checkpoint with a flipped bit in names, shapes, types or offsets never loads as something else."""
    file, model = text / "model.safetensors", LLM.from_pretrained(text)
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    for at in range(0, 8 + length, 7):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        try:
            again = LLM.from_pretrained(text)
        except ValueError as e:
            assert str(text) in str(e)
        else:
            assert equal(model, again)


def test_an_integer_that_no_float_holds_is_an_odd_value_of_a_config(tmp_path):
    """JSON has integers of any length; `float` of one with 400 digits is an OverflowError."""
    values = LLMConfig().to_dict() | {"rope_theta": 10**400}
    with pytest.raises(ValueError, match="rope_theta is 1000.* not a sensible float"):
        LLMConfig.from_dict(values, "config.json")
