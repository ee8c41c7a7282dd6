"""Calibration: within its bound, on own data, saved; and its measurement."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import calibrate
from calibrate import CalibrateOptions, assess, by_router, calibrate_model
from claims import calibration
from claims.calibration import CalibrationOptions, Outcome, by_bias
from data.encode import Encoder
from data.sample import BadSample, Faults, Message, Sample
from data.world import sample
from generate import load_model
from packing import collate
from vlm import SailVL


@pytest.fixture
def moe_model(config) -> SailVL:
    text = replace(config.text, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64)
    return SailVL(replace(config, text=text)).init_weights(0)


@pytest.fixture
def probes(documents, tokenizer):
    """Text-only batches, batches with pictures."""
    found = [[d for d in documents if bool(len(d.images)) == visual] for visual in (False, True)]
    assert all(found)
    return [[collate([some], None, tokenizer.pad)] for some in found]


def gates(model):
    return [block.mlp.gate.weight.clone() for block in model.language_model.model.layers]


@pytest.mark.parametrize("design", [by_bias, by_router])
def test_calibration_spreads_the_experts_within_its_bound(moe_model, probes, design):
    before = assess(moe_model, *probes)
    share = calibrate.calibrate(moe_model, *probes, design, bound=0.01)
    after = assess(moe_model, *probes)
    assert after.text_loss <= 1.01 * before.text_loss
    assert abs(after.text_entropy / before.text_entropy - 1) <= 0.01
    if design is by_router:
        assert share > 0 and before.visual_entropy < 1.2  # of log 4 = 1.39: there is room
        assert after.visual_entropy > 1.1 * before.visual_entropy


def test_an_impossible_bound_leaves_the_model_as_it_was(moe_model, probes):
    before = gates(moe_model)
    assert calibrate.calibrate(moe_model, *probes, bound=-1.0) == 0
    assert all(torch.equal(a, b) for a, b in zip(before, gates(moe_model)))


def test_calibration_names_what_it_lacks(model, moe_model, probes):
    text, pictures = probes
    for arguments, reason in (
        ((model, text, pictures), "dense"),
        ((moe_model, text, text), "no visual"),
        ((moe_model, pictures, pictures), "no text-only"),
    ):
        with pytest.raises(ValueError, match=reason):
            calibrate.calibrate(*arguments)


# ------------------------------------------------------------------------------- samples of both kinds


def shown(number: int) -> Sample:
    pixels = np.full((32, 32, 3), 20 * number % 255, np.uint8)
    question = Message("user", (Image.fromarray(pixels), f"\nwhat is number {number}?"))
    return Sample((question, Message("assistant", ("grey",))))


def said(number: int) -> Sample:
    question = Message("user", (f"what comes after {number}?",))
    return Sample((question, Message("assistant", (str(number + 1),))))


def test_samples_are_collected_by_kind_until_there_are_enough_and_faults_are_counted(encoder):
    records = []
    for number in range(20):
        records += [shown(number), said(number)]
    records[4] = BadSample("broken", "record 4")
    records[2] = Sample((Message("user", ("nobody answers",)),))
    faults = Faults()
    length = len(encoder(said(3)))
    wanted = {"text": 3 * length, "pictures": 1}
    found = calibrate.collect(iter(records), encoder, faults, wanted)
    assert [len(d.images) for d in found["pictures"]] == [1]
    assert 3 <= len(found["text"]) <= 4 and not any(d.images for d in found["text"])
    assert faults.counts == {"broken": 1, "nothing to learn": 1}


def test_pictures_of_a_kind_that_is_not_wanted_are_not_decoded(encoder):
    broken = Sample((Message("user", (b"no picture", "?")), Message("assistant", ("x",))))
    faults = Faults()
    found = calibrate.collect([broken, said(1)], encoder, faults, {"text": 1})
    assert len(found["text"]) == 1 and not faults.counts


def test_probe_batches_hold_whole_documents_in_order_and_no_more_tokens_than_asked(documents):
    lengths = [len(d) for d in documents]
    for tokens in (1, max(lengths), 3 * max(lengths), 10**6):
        batches = calibrate.probe_batches(documents, tokens, pad=0)
        assert [n for b in batches for n in b.segments.lengths] == lengths
        assert all(b.ids.shape[0] == 1 for b in batches)
        assert all(b.ids.numel() <= tokens or len(b.segments.lengths) == 1 for b in batches)
    assert len(batches) == 1


# ---------------------------------------------------------------------------------------- the command


@pytest.fixture
def saved(moe_model, tokenizer, tmp_path):
    moe_model.save_pretrained(tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    return tmp_path / "model"


def write_rows(path, numbers, picture: bool):
    """LLaVA rows, with a picture beside the file or without."""
    rows = []
    for number in numbers:
        mark = "<image>\n" if picture else ""
        turns = [
            {"from": "human", "value": f"{mark}what is number {number}?"},
            {"from": "gpt", "value": f"number {number} of many"},
        ]
        row = {"conversations": turns}
        if picture:
            row["image"] = f"{number}.png"
            pixels = np.full((32, 32, 3), 9 * number % 255, np.uint8)
            Image.fromarray(pixels).save(path.parent / row["image"])
        rows.append(row)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def options(saved, tmp_path, **more) -> CalibrateOptions:
    return CalibrateOptions(saved, tmp_path / "out", tokens=300, steps=20, **more)


def test_the_command_calibrates_on_own_data_and_saves_a_model_that_differs_in_its_gates(
    saved, moe_model, tmp_path, capsys
):
    data = write_rows(tmp_path / "seen.jsonl", range(12), picture=True)
    rows = data.read_text() + write_rows(tmp_path / "text.jsonl", range(12), False).read_text()
    data.write_text(rows)
    (tmp_path / "3.png").write_bytes(b"no picture")
    calibrate_model(options(saved, tmp_path, data=data))

    before = dict(moe_model.named_parameters())
    after, words = load_model(tmp_path / "out")
    changed = {n for n, p in after.named_parameters() if not torch.equal(p, before[n])}
    assert changed and all(name.endswith("mlp.gate.weight") for name in changed)
    assert after.image_token_id == words.image
    out = capsys.readouterr().out
    assert "pictures: " in out and "visual tokens" in out and "skipped 1 x " in out


def test_text_may_come_from_a_file_of_its_own(saved, tmp_path, capsys):
    data = write_rows(tmp_path / "seen.jsonl", range(12), picture=True)
    text = write_rows(tmp_path / "text.jsonl", range(12), picture=False)
    with pytest.raises(ValueError, match="without a picture .* --text FILE"):
        calibrate_model(options(saved, tmp_path, data=data))
    with pytest.raises(ValueError, match="no usable sample with a picture"):
        calibrate_model(options(saved, tmp_path, data=text))
    assert not (tmp_path / "out").exists()

    calibrate_model(options(saved, tmp_path, data=data, text=text))
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_without_data_the_drawn_world_is_used(saved, tmp_path):
    calibrate_model(options(saved, tmp_path, dtype="bfloat16"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["llm_config"]["num_experts"]


def test_what_the_command_cannot_do_is_an_error_before_anything_is_read(
    saved, model, tokenizer, tmp_path, monkeypatch
):
    with pytest.raises(ValueError, match="--images is the folder of --data"):
        calibrate_model(options(saved, tmp_path, images=tmp_path))
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save(tmp_path / "dense")
    with pytest.raises(ValueError, match="dense; only experts"):
        calibrate_model(options(tmp_path / "dense", tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="one process"):
        calibrate_model(options(saved, tmp_path))


# ------------------------------------------------------------------------------------ the measurement


@pytest.mark.slow
def test_the_measurement_compares_designs_on_held_out_data(saved, tmp_path, monkeypatch):
    def small(encoder, mixture, seed, test, draw=calibration.draw_batches):
        return draw(encoder, mixture, seed, test, count=1, samples=10)

    monkeypatch.setattr(calibration, "draw_batches", small)
    out = tmp_path / "calibration.html"
    calibration.measure_calibration(CalibrationOptions(model=saved, seeds=1, held=2, out=out))
    table = out.with_suffix(".md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in table[2:]] == list(calibration.DESIGNS)
    assert "of log E" in table[4] and table[4].count(" %)") == 3
    assert out.read_text().count("text, layer 0") and "</html>" in out.read_text()


def test_changes_in_the_table_are_means_over_draws_against_the_model_as_it_was():
    def outcome(visual: float, loss: float, answers: float) -> Outcome:
        """Loads of two experts with this entropy, as a fraction of log 2."""
        share = {0.0: 1.0, 1.0: 0.5}[visual]
        use = torch.tensor([share, 1 - share]).expand(2, 1, 2)
        return Outcome(1.0, calibrate.Assessment(loss, use), 0.0, answers)

    draws = []
    for loss in (1.1, 1.3):
        even = {name: outcome(1.0, loss, 0.75) for name in ("by_bias", "by_router")}
        draws.append({"as it was": outcome(1.0, 1.0, 0.5)} | even)
    lines = calibration.table_rows(draws)
    assert "| 1.200 (+20.00 %) | 75.0% |" in lines[4] and "| 1.000 | 50.0% |" in lines[2]
    assert f"{math.log(2):.3f} nats, 100% of log E (+0.0 %)" in lines[4]


def test_token_accuracy_counts_labelled_tokens_only(moe_model, tokenizer, config):
    encoder = Encoder(tokenizer, config, max_length=512)
    batch = collate([[encoder(sample(0, 0, {"caption": 1.0}))]], None, tokenizer.pad)
    labels = batch.labels.reshape(-1)
    with torch.no_grad():
        logits = moe_model(batch.ids, batch.images, batch.positions, batch.segments)[0]
    right = (logits.argmax(-1) == labels)[labels >= 0].float().mean()
    assert calibration.token_accuracy(moe_model, [batch]) == pytest.approx(float(right))
