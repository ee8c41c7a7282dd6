"""The studies of data against data: their data sets are what they are called, and their sums are right."""

from collections import Counter
from pathlib import Path

import pytest

from claims import data_quality
from claims.data_quality import (
    PICTURED,
    STUDIES,
    Lab,
    QualityOptions,
    answered,
    balance_arms,
    captions_by_kind,
    digest_of,
    effects_table,
    filter_arms,
    judged,
    quality_table,
    questions_from_captions,
    quick_arms,
    scale_arms,
    skewed_captions,
    spoiled,
    study_data,
)
from curation.balance import answers_as_text
from data.encode import truth_of
from vlm import SailVL


def is_good(sample) -> bool:
    return sample.facts["vir"] >= 3 and sample.facts["ita"] >= 3


@pytest.fixture
def lab(tmp_path, tokenizer, config):
    """With a tenth of the samples, and a small untrained model as the checkpoints."""
    for name in ("vit2", "vit3"):
        SailVL(config).init_weights(0).save_pretrained(tmp_path / "runs" / name)
        tokenizer.save(tmp_path / "runs" / name)
    return Lab(QualityOptions(runs=tmp_path / "runs", out=tmp_path, effort=0.1, samples=24))


# -------------------------------------------------------------------------------------------- data


def test_more_noise_spoils_other_captions_of_the_same_pictures():
    clean = spoiled(40, 0, 0.0)
    half = spoiled(40, 0, 0.5)
    assert [s.origin for s in clean] == [s.origin for s in half]
    assert all(is_good(s) for s in clean)
    assert 5 < sum(s.facts["noise"] != "none" for s in half) < 35
    assert digest_of(clean) != digest_of(half)


def test_the_judge_errs_as_often_as_it_is_told_to():
    captions = spoiled(200, 0, 0.5)
    good = sum(map(is_good, captions))
    exact = judged(captions, 0, error=0.0)
    assert exact and all(map(is_good, exact)) and len(exact) == good
    erring = judged(captions, 0, error=0.1)
    lost = good - sum(map(is_good, erring))
    kept = len(erring) - sum(map(is_good, erring))
    assert 0.03 < lost / good < 0.2
    assert 0.03 < kept / (200 - good) < 0.2


def test_balanced_sets_are_as_large_and_less_skewed(lab):
    arms = {arm.name: arm.samples for arm in balance_arms(lab, 0)}
    thinned = arms.pop("thinned by n-grams")
    even = arms["even over latent classes"]
    assert len(thinned) == len(even) == len(arms["as many at random"]) < len(arms["as it is"])

    def most(samples) -> float:
        counts = Counter(s.facts["family"] for s in samples)
        return max(counts.values()) / len(samples)

    assert most(thinned) < most(arms["as it is"])
    assert most(even) < most(arms["as it is"])


def test_the_skewed_set_has_every_kind():
    counts = Counter(s.facts["family"] for s in skewed_captions(100, 0))
    assert counts["dots"] == 70 and counts["sum"] == 15 and set(counts) == set(PICTURED)


def test_held_out_captions_are_of_other_scenes_and_graded_by_kind():
    held_out = captions_by_kind(20, 1, test=True)
    train = captions_by_kind(20, 0, test=False)
    said = {answers_as_text(s) for s in train if s.facts["family"] == "objects"}
    assert not said & {answers_as_text(s) for s in held_out}
    assert {s.facts["grader"] for s in held_out} == {"phrases"}


def test_questions_are_of_the_caption_and_the_sizes_are_parts_of_one_another(lab):
    arms = list(scale_arms(lab, 0))
    sizes = [len(arm.samples) for arm in arms]
    assert sizes == sorted(sizes) and sizes[0] == 5
    assert digest_of(arms[-1].samples[:5]) == digest_of(arms[0].samples)

    (asked,) = questions_from_captions(captions_by_kind(1, 0, test=False)[:1], 0, count=4)
    turns = [m for m in asked.messages if m.role == "assistant"]
    assert len(turns) == 4 and asked.facts["answer"] == truth_of(asked)
    assert asked.facts["family"] == "objects"


def test_quick_sets_are_a_third_of_the_whole_ones_which_other_studies_train_on(lab):
    arms = {arm.name: arm for arm in quick_arms(lab, 0)}
    assert len(arms["none spoiled, quick"].samples) == 34
    shared = {digest_of(arm.samples) for arm in filter_arms(lab, 0)}
    assert {digest_of(arms[f"{n} spoiled"].samples) for n in ("none", "18%", "50%")} <= shared


def test_a_caption_can_be_replaced():
    (one,) = spoiled(1, 0, 0.0)
    assert answers_as_text(answered(one, "a cat")) == "a cat"
    assert answered(one, "a cat").messages[0] == one.messages[0]


# ---------------------------------------------------------------------------------------- verdicts


def noted(lab, study: str, scores: dict[str, list[float]]) -> None:
    for arm, values in scores.items():
        for seed, value in enumerate(values):
            row = {"study": study, "arm": arm, "seed": seed, "records": 10, "steps": 4}
            lab.rows.append(row | {"scores": {"overall": value}})


def test_an_effect_is_a_difference_of_the_same_seeds(lab):
    noted(lab, "recaption", {"alt-texts": [0.1, 0.3], "re-captioned": [0.2, 0.6]})
    table = quality_table(lab, "recaption")
    assert "| alt-texts | 10 | 4 | 0.200 | 0.141 | 2 |" in table
    assert "re-captioned, against alt-texts: +0.200 +- 0.141, better in 2 of 2 seeds" in table
    line = "| recaption | re-captioned | alt-texts | 0.400 | 0.200 | +0.200 | 0.141 | 2 of 2 |"
    assert line in effects_table(lab, ["recaption"])


def test_rankings_are_compared_seed_by_seed(lab):
    lab.options.seeds = 2
    noted(lab, "quick", {"a": [0.3, 0.3], "a, quick": [0.2, 0.1]})
    noted(lab, "quick", {"b": [0.4, 0.4], "b, quick": [0.3, 0.0]})
    assert "1.00, -1.00; same order in 1 of 2" in quality_table(lab, "quick")


def test_a_log_law_is_fitted_to_the_sizes(lab):
    lab.options.seeds = 1
    lab.options.effort = 1.0
    scores = {f"{size} captions": [0.1 * i] for i, size in enumerate(data_quality.SIZES)}
    noted(lab, "scale", scores)
    assert "R^2 1.000" in quality_table(lab, "scale")


# ----------------------------------------------------------------------------------------- command


def test_every_claim_is_about_arms_that_there_are(lab, monkeypatch):
    monkeypatch.setattr(data_quality, "recaptioned", lambda lab, raw, *_: raw)
    lab.options.effort = 0.02
    for study in STUDIES.values():
        names = {arm.name for arm in study.arms(lab, 0)}
        assert {name for pair in study.claims for name in pair} <= names


def test_an_unknown_study_is_named():
    with pytest.raises(ValueError, match="--only nothing: choose from filter"):
        study_data(QualityOptions(only=("nothing",), out=Path("nowhere")))


@pytest.mark.slow
def test_a_study_runs_and_a_second_call_trains_nothing(lab, monkeypatch, capsys):
    lab.options.only = ("recaption",)
    lab.options.seeds = 1
    lab.options.effort = 0.02
    study_data(lab.options)
    assert "re-captioned, against alt-texts" in (lab.options.out / "recaption.md").read_text()
    monkeypatch.setattr(data_quality, "train_and_grade", lambda *_: pytest.fail("it was known"))
    monkeypatch.setattr(data_quality, "captions_by_trained", lambda *_: pytest.fail("known"))
    study_data(lab.options)
