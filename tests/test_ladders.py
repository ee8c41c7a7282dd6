"""What is said of ladders: differences and their errors, the story, seeds together, two runs side by side."""

import json
from dataclasses import replace

import pytest
from ladders import ladder, stage

from data import world
from evaluate import Graded
from tools import compare, picture, readme, seeds, story
from tools.compare import LadderPairOptions, compare_ladders, read_ladder
from tools.evidence import Difference, improvement, lookups, paired, read_results, unpaired
from tools.ladder import both_ways, modes_by_family, question_digests, shown_pairs
from tools.seeds import SeedsOptions, known_seeds, summarise_seeds
from toy import read_plan


def written(folder, results: dict, samples: dict | None = None):
    """A run's directory."""
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results))
    if samples:
        (folder / "samples.json").write_text(json.dumps(samples))
    return folder


# ------------------------------------------------------------------------------------ evidence


def test_pairs_are_surer_than_shares():
    before = [0.0] * 20 + [1.0] * 180
    after = [1.0] * 8 + [0.0] * 12 + [1.0] * 180
    pairs = paired(before, after)
    shares = unpaired(0.9, 0.94, 200, 200)
    assert pairs.value == pytest.approx(shares.value) == pytest.approx(0.04)
    assert pairs.sure and not shares.sure
    # by hand: changes of variance p - p^2 with p = .04, of n = 200
    assert pairs.error == pytest.approx((0.04 * 0.96 / 199) ** 0.5)
    with pytest.raises(ValueError):
        paired([1.0], [1.0, 0.0])


def test_a_difference_without_an_error_is_never_sure():
    loss = improvement(stage("image", 3.0, 1.0, lower_is_better=True))
    assert loss == Difference(2.0) and not loss.sure
    assert not Difference(0.02, 0.01).sure and Difference(-0.021, 0.01).sure
    assert improvement(stage("soup", 0.9, 0.92, error=0.001)).sure
    assert not improvement(stage("soup", 0.9, 0.92)).sure


def test_a_skill_comes_with_the_first_stage_above_halfway_and_a_side_road_brings_none():
    assert lookups(ladder()) == {"counting": "multitask", "charts": "sft2", "overall": "multitask"}
    assert lookups(ladder(charts=0.6))["charts"] is None  # at halfway, not above; .99 on the branch


def test_a_directory_that_is_no_run_is_named_in_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"results\.json: not there; a ladder writes it"):
        read_results(tmp_path)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(ValueError, match=r"results\.json: not JSON"):
        read_results(tmp_path)


# --------------------------------------------------------------------------------------- story


def test_the_story_is_three_lines_from_the_numbers():
    skills, repair, thinking = story.story_lines(ladder())
    assert "counting with multitask" in skills
    assert "phase made for it: charts (sft2)" in skills
    assert "Points below their best after sft2: counting 40." in repair
    assert "from 72.5 to 92.5 %" in repair
    assert "+2.0 ± 4.0 points, not above two standard errors" in repair
    assert thinking.startswith("Thinking costs") and "(-20.0 points)" in thinking
    assert story.story_lines({"stages": [], "final": {}}) == []


@pytest.mark.parametrize("think, verb", [(0.95, "pays"), (0.85, "costs"), (0.91, "changes little")])
def test_thinking_pays_or_costs_only_above_two_standard_errors(think, verb):
    results = ladder(think=think)
    results["modes"]["error"] = 0.01
    assert story.thinking_line(results).startswith(f"Thinking {verb}:")


def counted(said: str, truth: str = "3", score: float = 1.0, number: int = 1) -> Graded:
    sample = world.sample(number, 0, {"counting": 1.0}, turns=1)
    sample = replace(sample, facts=sample.facts | {"chain": "1 + 2 = 3."})
    return Graded("counting", "how many?", truth, said, score, sample)


def thought_through() -> list[tuple[Graded, Graded]]:
    """Three questions both ways: thinking wins one, loses one to another chain, and one without a box."""
    ways = [
        (0.0, "<think>1 + 2 = 3.</think>\\boxed{3}", 1.0),
        (1.0, "<think>2 + 2 = 4.</think>\\boxed{4}", 0.0),
        (1.0, "<think>1 + 2", 0.0),
    ]
    pairs = []
    for number, (direct, chain, score) in enumerate(ways):
        first = counted("3" if direct else "2", score=direct, number=number)
        pairs.append((first, replace(first, said=chain, score=score)))
    return pairs


def test_thinking_is_compared_question_by_question_and_by_what_its_chain_says():
    pairs = thought_through()
    direct = [d for d, _ in pairs]
    thinking = [t for _, t in pairs]
    assert both_ways(direct, thinking[::-1]) == pairs[::-1]
    row = modes_by_family(pairs)["counting"]
    assert (row["only_direct"], row["only_think"], row["n"]) == (2, 1, 3)
    assert row["ends"] == {"as the reference": [1, 1], "another chain": [0, 1], "no box": [0, 1]}

    # the page: who won, an example each, and no sentence without its numbers
    results = ladder()
    results["modes"]["families"] = {"counting": row}
    shown = shown_pairs(pairs, None)
    assert [pair["shown"] for pair in shown] == ["first", "won", "lost"]
    part = story.thinking_part(results, shown)
    assert "Why thinking loses" in part and "Thinking wins" in part and "1 of 1" in part
    assert "Of its 2 wrong answers 1 stand after a chain that differs" in story.thinking_line(
        results
    )
    assert story.thinking_part(ladder(), shown) == ""


def test_digests_tell_other_questions_apart():
    graded = [d for d, _ in thought_through()]
    assert question_digests(graded) == question_digests(list(graded))
    assert question_digests(graded) != question_digests(
        [replace(graded[0], truth="4"), *graded[1:]]
    )


# --------------------------------------------------------------------------------------- seeds


@pytest.fixture
def two_seeds(tmp_path):
    """The summary of two seeds: the second one's thinking pays, its soup does not."""
    other = ladder(seed=1, charts=0.8, think=0.95)
    other["stages"][-1] = stage("soup", 0.9, 0.7)
    runs = (written(tmp_path / "toy-seed0", ladder()), written(tmp_path / "toy-seed1", other))
    summarise_seeds(SeedsOptions(runs, tmp_path / "toy-seeds"))
    return json.loads((tmp_path / "toy-seeds" / "summary.json").read_text())["dense"]


def test_seeds_are_means_ranges_and_counts(two_seeds, tmp_path, capsys):
    stages = {row["name"]: row for row in two_seeds["stages"]}
    assert stages["soup"]["after"] == {"mean": 0.81, "low": 0.7, "high": 0.92, "each": [0.92, 0.7]}
    assert stages["soup"]["better"] == 1
    assert (stages["soup"]["surely_better"], stages["soup"]["surely_worse"]) == (0, 1)
    assert stages["language"]["better"] == 2 and stages["language"]["surely_better"] is None
    assert two_seeds["skills"]["charts"] == {"sft2": 2}
    assert two_seeds["thinking"]["gain"]["each"] == [-0.2, 0.05]
    assert seeds.worst_family(two_seeds) == ("charts", 0.8, 1)
    assert seeds.how_often(stages["soup"], 2) == "1 of 2, surely 0; surely worse 1"

    page = (tmp_path / "toy-seeds" / "report.html").read_text()
    assert "1 of 2, surely 0; surely worse 1" in page and page.count('class="band"') > 3


def test_seeds_of_another_ladder_are_refused(tmp_path):
    first = written(tmp_path / "a", ladder())
    twin = written(tmp_path / "b", ladder())
    longer = written(tmp_path / "c", ladder(1) | {"options": {"effort": "2.0", "seed": "1"}})
    shorter = ladder(1)
    shorter["stages"] = shorter["stages"][1:]
    shorter = written(tmp_path / "d", shorter)
    for other, fault in (
        (twin, "both of seed 0"),
        (longer, "other options"),
        (shorter, "other stages"),
        (tmp_path / "nowhere", "not there"),
    ):
        with pytest.raises(ValueError, match=fault):
            summarise_seeds(SeedsOptions((first, other), tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_not_among_the_runs_keeps_what_was_known(two_seeds, tmp_path):
    moe = written(tmp_path / "moe", ladder(3) | {"model": "moe"})
    summarise_seeds(SeedsOptions((moe,), tmp_path / "toy-seeds"))
    summary = json.loads((tmp_path / "toy-seeds" / "summary.json").read_text())
    assert summary["dense"] == two_seeds and summary["moe"]["seeds"] == [3]


def test_a_report_knows_only_seeds_of_the_same_ladder(two_seeds, tmp_path, monkeypatch):
    monkeypatch.setattr(seeds, "PUBLISHED", tmp_path / "none.json")
    assert known_seeds(ladder(7), tmp_path) == two_seeds
    assert known_seeds(ladder(7) | {"options": {"effort": "0.2"}}, tmp_path) is None
    assert known_seeds(ladder(7) | {"model": "moe"}, tmp_path) is None
    monkeypatch.setattr(seeds, "PUBLISHED", tmp_path / "toy-seeds" / "summary.json")
    assert known_seeds(ladder(7), tmp_path / "elsewhere") == two_seeds


def test_a_curve_shows_the_range_of_seeds_only_where_they_know_every_stage(two_seeds):
    assert 'class="band"' in story.skill_chart("charts", ladder(), "sft2", two_seeds)
    changed = ladder()
    changed["families_after"]["a new stage"] = {"charts": 0.5}
    assert 'class="band"' not in story.skill_chart("charts", changed, "sft2", two_seeds)


def test_pages_show_ranges_where_there_are_seeds(two_seeds, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    assert readme.tables_over_seeds("toy") is None
    (tmp_path / "toy-seeds").rename(tmp_path / "runs" / "toy-seeds")

    # "at least" is rounded down
    file = tmp_path / "runs" / "toy-seeds" / "summary.json"
    summary = json.loads(file.read_text())
    summary["dense"]["final"]["charts"]["over_chance"]["low"] = 19.9
    file.write_text(json.dumps(summary))
    table = readme.tables_over_seeds("toy")
    assert "| 0.900 | **0.810** | 0.700 to 0.920 | 1 of 2, surely 0; surely worse 1 |" in table
    assert "| charts | **85.0%** | 80.0 to 90.0 | 20.0% | 19 |  | sft2 2 |" in table

    drawing = picture.draw_ladder(picture.seed_numbers(two_seeds))
    assert "mean of 2 seeds" in drawing and drawing.count('class="band"') == 3


# ------------------------------------------------------------------------------ two side by side


def test_two_runs_are_compared_sample_by_sample_where_they_can_be(tmp_path, capsys):
    scores = {"charts": [0.0] * 10 + [1.0] * 90, "counting": [1.0] * 95 + [0.0] * 5}
    better = scores | {"charts": [1.0] * 100}
    questions = {"charts": "abc", "counting": "def"}
    a = written(
        tmp_path / "a",
        ladder(),
        {"questions": questions, "scores": {"final": scores, "sft2": scores}},
    )
    b = written(
        tmp_path / "b",
        ladder(1, charts=1.0),
        {"questions": questions, "scores": {"final": better, "sft2": better}},
    )
    first, second = read_ladder(a), read_ladder(b)
    assert compare.family_difference(first, second, "charts").error == pytest.approx(
        0.03, abs=0.001
    )
    assert compare.stage_difference(first, second, "sft2").error == pytest.approx(0.03, abs=0.001)
    assert compare.family_difference(first, second, "overall").value == pytest.approx(0.05)

    # of other questions only the shares are compared
    second.samples["questions"] = {"charts": "another", "counting": "def"}
    shares = compare.family_difference(first, second, "charts")
    assert shares == unpaired(0.9, 1.0, 100, 100)

    compare_ladders(LadderPairOptions((a, b)))
    said = capsys.readouterr().out
    assert "+10.0 ± 3.0 *" in said and "counting       95.0%   95.0%  +0.0 ± 0.0\n" in said
    page = (b / "compare.html").read_text()
    assert 'class="r good">+10.0 ± 3.0' in page


def test_stages_and_options_that_only_one_run_has_are_shown_as_such(tmp_path, capsys):
    longer = ladder(1) | {"options": {"out": "x", "effort": "2"}}
    longer["stages"].insert(1, stage("image", 0.1, 0.2))
    a = written(tmp_path / "a", ladder())
    b = written(tmp_path / "b", longer)
    for run, rate in ((a, 1e-3), (b, 2e-3)):
        (run / "sft2").mkdir()
        (run / "sft2" / "stage.json").write_text(json.dumps({"lr": rate, "seed": rate}))
        (run / "sft2" / "log.jsonl").write_text('{"step": 0, "lr": 0.001, "loss": 2.0}\n' * 9)
    first, second = read_ladder(a), read_ladder(b)
    differ = [row[0] for row in compare.options_that_differ(first, second)]
    assert differ == ["seed", "effort", "sft2: lr"]
    assert compare.stage_difference(first, second, "image") is None
    assert list(compare.in_either(first.stages, second.stages))[1] == "image"

    compare_ladders(LadderPairOptions((a, b), tmp_path / "deep" / "page.html"))
    page = (tmp_path / "deep" / "page.html").read_text()
    assert "loss of sft2 in both runs" in page and "<script" not in page


@pytest.mark.parametrize(
    "text, said",
    [
        ("[1]", "not an object of stages"),
        ("{", "not an object of stages"),
        ('{"sft9": {}}', "no stage 'sft9'"),
        ('{"sft1": {"mixtures": {}}}', "may have"),
        ('{"sft1": ["steps"]}', "may have"),
        ('{"sft1": 3}', "may have"),
        ("[]", "not an object of stages"),
        ('{"sft1": {"mixture": {"video": 1, "vidoe": 1}}}', "sft1 mixes 'vidoe', which no row is"),
        ('{"sft1": {"mixture": {}}}', "give tasks with positive weights"),
        ('{"sft1": {"mixture": ["video"]}}', "give tasks with positive weights"),
        ('{"sft1": {"mixture": {"video": -1}}}', "give tasks with positive weights"),
        ('{"sft1": {"mixture": {"video": NaN}}}', "give tasks with positive weights"),
        ('{"sft1": {"steps": 0}}', "sft1 has 0 steps; give a positive integer"),
        ('{"sft1": {"steps": true}}', "sft1 has True steps; give a positive integer"),
        ('{"sft1": {"graded": "order"}}', "give a list of families"),
        ('{"sft1": {"graded": [{}]}}', "give a list of families"),
        ('{"sft1": {"graded": ["orders"]}}', "graded by 'orders', which is not held out"),
        ('{"image": {"graded": ["order"]}}', "not graded by families of its own"),
    ],
)
def test_a_plan_that_no_stage_reads_is_an_error_that_names_the_file(tmp_path, text, said):
    (tmp_path / "stages.json").write_text(text)
    with pytest.raises(ValueError, match=f"stages.json.*{said}"):
        read_plan(tmp_path / "stages.json", {"video"}, {"order", "video"})
    assert read_plan(tmp_path / "none.json", set(), set()) == {}
