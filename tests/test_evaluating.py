"""Evaluating data: trials are remembered, rankings are compared, what is no worse is kept."""

import json
from dataclasses import replace

import pytest
import torch

from curation import evaluating
from curation.evaluating import (
    AnnealingOptions,
    CompositionOptions,
    Contest,
    IncrementalOptions,
    Mix,
    QuickOptions,
    Selection,
    Standing,
    TrialBook,
    annealed,
    annealed_evaluation,
    composition_evaluation,
    evenly,
    incremental_evaluation,
    quick_evaluation,
    rank_correlation,
    standings_table,
)
from curation.rows import RowWriter
from data.world import World, sample
from stage import Stage
from vlm import SailVL

STAGE = Stage("trial", steps=4, rows=1, length=256)


@pytest.fixture(scope="module")
def files(tmp_path_factory, config, tokenizer):
    """A mixture of three data sets, a held-out file, and a checkpoint."""
    root = tmp_path_factory.mktemp("evaluating")
    entries = {}
    for number, (name, size) in enumerate((("a", 8), ("b", 12), ("c", 16))):
        with RowWriter(root / f"{name}.jsonl") as rows:
            for i in range(size):
                rows.write(sample(i, number, {"attributes": 1.0}))
        entries[name] = {"data": f"{name}.jsonl"}
    (root / "mix.json").write_text(json.dumps({"datasets": entries}))
    with RowWriter(root / "held_out.jsonl") as rows:
        for each in World().held_out("attributes", 4):
            rows.write(each)
    SailVL(config).init_weights(0).save_pretrained(root / "start")
    tokenizer.save(root / "start")
    return root


def options(kind, files, out, **more):
    """Of a command, as short as it gets."""
    if kind is not AnnealingOptions:
        more = {"mix": files / "mix.json", "model": files / "start"} | more
    return kind(**{"held_out": files / "held_out.jsonl", "out": out, "stage": STAGE} | more)


@pytest.fixture
def scored(monkeypatch):
    """Trainings replaced by a rule: (how many records of each data set) -> score. Returns the calls."""
    calls = []

    def rule(start, work, held_out, ranks=None, max_new=48):
        source, stage = work[0]
        names = [path.stem for path, _ in source.samples.files]
        counts = dict.fromkeys(names, 0)
        for record in source.records.tolist():
            counts[names[int(source.samples.spans[record][0])]] += 1
        calls.append((counts, stage))
        return score_of_counts(counts)

    def score_of_counts(counts):
        # a is good, b is bad, c makes no difference
        score = 0.5 + 0.01 * counts["a"] - 0.01 * counts["b"]
        return {"attributes": score, "overall": score}

    monkeypatch.setattr(evaluating, "train_and_grade", rule)
    return calls


# ------------------------------------------------------------------------------------- small parts


def test_rankings_are_compared_by_place_and_ties_share_theirs():
    assert rank_correlation([1, 2, 3, 4], [10, 20, 30, 400]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert evaluating.ranks_of([5, 1, 5]) == [2.5, 1, 2.5]
    assert rank_correlation([1, 1, 1], [1, 2, 3]) == 0
    with pytest.raises(ValueError, match="cannot be compared"):
        rank_correlation([1], [1])


def test_a_part_of_the_records_is_spread_over_all_of_them():
    records = torch.arange(100, 200)
    assert evenly(records, 4).tolist() == [100, 125, 150, 175]
    assert evenly(records, 1000).equal(records)


def test_a_selection_shows_each_of_its_records_once_in_a_pass():
    chosen = Selection([f"sample {i}" for i in range(10)], torch.tensor([1, 3, 5]))
    stream = chosen.stream({}, seed=0)
    passes = [[stream[3 * k + i] for i in range(3)] for k in range(2)]
    for one in passes:
        assert sorted(one) == ["sample 1", "sample 3", "sample 5"]


def test_a_trial_is_remembered_and_a_torn_line_is_not(tmp_path):
    path = tmp_path / "trials.jsonl"
    assert TrialBook(path).score({"seed": 0}, lambda: {"overall": 0.5}) == {"overall": 0.5}
    with open(path, "a") as file:
        file.write('{"trial": {"seed": 1}, "sco')
    again = TrialBook(path)
    assert again.score({"seed": 0}, lambda: pytest.fail("it was known")) == {"overall": 0.5}
    assert again.score({"seed": 1}, lambda: {"overall": 0.7}) == {"overall": 0.7}
    assert len(path.read_text().splitlines()) == 2


def test_the_table_has_a_line_for_each_and_cells_for_families_that_are_missing():
    one = Standing("a", 10, 5, [0.4, 0.6], {"counting": 0.5})
    other = Standing("b|c", 10, 5, [0.3])
    lines = standings_table([one, other]).splitlines()
    assert "| a | 10 | 5 | 0.500 | 0.141 | 0.500 |  |" in lines
    assert "| b/c | 10 | 5 | 0.300 | 0.000 |  |  |" in lines


# --------------------------------------------------------------------------------------- commands


def test_quick_evaluation_ranks_equally_many_records_of_each(files, tmp_path, scored):
    quick_evaluation(options(QuickOptions, files, tmp_path, check=True))
    short = [(sum(counts.values()), stage.steps) for counts, stage in scored[:3]]
    whole = [(sum(counts.values()), stage.steps) for counts, stage in scored[3:]]
    assert short == [(2, 4)] * 3
    assert whole == [(8, 16), (12, 24), (16, 32)]
    result = json.loads((tmp_path / "quick.json").read_text())
    assert result["rank_correlation"] == pytest.approx(1)
    assert "best in quick evaluation: a" in (tmp_path / "quick.md").read_text()


def test_a_halving_that_is_no_worse_is_kept(files, tmp_path, scored):
    composition_evaluation(options(CompositionOptions, files, tmp_path))
    result = json.loads((tmp_path / "composition.json").read_text())
    assert result["records"] == {"a": 8, "b": 6, "c": 8}
    verdicts = [standing["verdict"] for standing in result["standings"]]
    assert verdicts == ["", "whole again", "stays halved", "stays halved"]


def test_a_data_set_that_is_no_worse_joins(files, tmp_path, scored):
    incremental_evaluation(options(IncrementalOptions, files, tmp_path, base=("a",)))
    result = json.loads((tmp_path / "incremental.json").read_text())
    assert result["records"] == {"a": 8, "c": 16}
    assert [s["verdict"] for s in result["standings"]] == ["", "stays out", "joins"]


def test_what_counts_as_level_is_measured_from_the_best_so_far(files, tmp_path, scored):
    # halving a costs 0.04, which is level; halving b gains 0.06, and c nothing
    composition_evaluation(options(CompositionOptions, files, tmp_path, level=0.05))
    result = json.loads((tmp_path / "composition.json").read_text())
    assert result["records"] == {"a": 4, "b": 6, "c": 8}
    assert result["verdict"].endswith("0.460 -> 0.480")


def test_every_seed_is_a_training_of_its_own_and_none_is_repeated(files, tmp_path, scored):
    first = options(QuickOptions, files, tmp_path, seeds=2)
    quick_evaluation(first)
    assert len({(str(counts), stage.seed) for counts, stage in scored}) == 6
    quick_evaluation(replace(first, seeds=3))
    assert len(scored) == 9


@pytest.mark.parametrize(
    "kind, more, says",
    [
        (IncrementalOptions, {"base": ("z",)}, "no data set 'z'; choose from a, b, c"),
        (IncrementalOptions, {"base": ()}, "--base"),
        (QuickOptions, {"seeds": 0}, "--seeds"),
        (QuickOptions, {"anneal_steps": 3}, "belong together"),
        (QuickOptions, {"stage": replace(STAGE, samples="fusion")}, "on answers or chains"),
        (QuickOptions, {"stage": replace(STAGE, turns=2)}, "--turns"),
        (AnnealingOptions, {"models": ()}, "--models"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_trained(
    files, tmp_path, scored, kind, more, says
):
    run = {
        IncrementalOptions: incremental_evaluation,
        QuickOptions: quick_evaluation,
        AnnealingOptions: annealed_evaluation,
    }[kind]
    with pytest.raises(ValueError, match=says):
        run(options(kind, files, tmp_path, **more))
    assert not scored


def test_a_file_that_is_no_mixture_is_named(files):
    with pytest.raises(ValueError, match="held_out.jsonl: no mixture file"):
        Mix(files / "held_out.jsonl", False)


def test_a_trial_trains_ends_on_the_annealing_and_is_remembered(files, tmp_path, monkeypatch):
    wanted = options(
        QuickOptions, files, tmp_path, limit=2, anneal=files / "c.jsonl", anneal_steps=2
    )
    source = Mix(files / "mix.json", False).collection({"a": 4})
    first = Contest(wanted).standing("a", files / "start", source, 2)
    assert (first.records, first.steps) == (4, 2)
    assert 0 <= first.mean <= 1

    monkeypatch.setattr(evaluating, "train_and_grade", lambda *_: pytest.fail("it was known"))
    contest = Contest(wanted)
    assert contest.standing("again", files / "start", source, 2).scores == first.scores
    sources = [len(chosen) for chosen, _ in contest.work(source, 2, 0)]
    assert sources == [4, 16]


def test_annealing_falls_from_the_rate_without_a_rise():
    stage = annealed(Stage(lr=1.0, schedule="wsd", warmup=0.5), 10)
    rates = [stage.rate(step) for step in range(10)]
    assert rates[0] == 1.0 and rates[-1] < 0.2
    assert rates == sorted(rates, reverse=True)


def test_annealing_grades_before_and_after(files, tmp_path, config, tokenizer, monkeypatch):
    grades = iter([0.2, 0.5, 0.4, 0.45])
    monkeypatch.setattr(evaluating, "train_and_grade", lambda *_: {"overall": next(grades)})
    later = tmp_path / "later"
    SailVL(config).init_weights(1).save_pretrained(later)

    models = (files / "start", later)
    data = files / "a.jsonl"
    annealed_evaluation(
        options(AnnealingOptions, files, tmp_path, models=models, anneal=data, anneal_steps=2)
    )
    result = json.loads((tmp_path / "annealing.json").read_text())
    assert [s["scores"] for s in result["standings"]] == [[0.2], [0.5], [0.4], [0.45]]
    assert result["verdict"] == "best when annealed: start, annealed"
