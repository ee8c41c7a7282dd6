"""Filters that choose what to train on: difficulty, free response, rejection sampling, blending."""

from itertools import islice

import pytest

from curation import chains, difficulty
from data import world
from data.sample import Message, Sample
from generate import Answer


def ask(answer, text="what?", family="f"):
    return Sample(
        (Message("user", (text,)), Message("assistant", (answer,))),
        family,
        "",
        {"answer": answer, "family": family, "chain": "a."},
    )


def test_difficulty_filters_follow_the_paper():
    samples = [
        ask(str(i), family=f)
        for i, f in enumerate(("think", "think", "think", "look", "look", "look"))
    ]
    kept = difficulty.by_difficulty(samples, [0.0, 0.5, 1.0, 0.0, 0.5, 1.0], {"think"})
    assert [s.facts["answer"] for s in kept] == [
        "1",
        "3",
        "4",
    ]  # reasoning: strictly between; others: all but the solved
    assert [
        s.facts["answer"] for s in difficulty.hard(samples, [0.5, 0.25, 0.0, 0.75, 1.0, 0.5])
    ] == ["1", "0", "5"]


def test_multiple_choice_becomes_free_response_where_that_makes_sense():
    choices = "\n(A) 12\n(B) 15\nC. 18\n"
    good, lone = ask("B", "how long is the side?" + choices), ask("7", "how many dots are there?")
    bad = [
        ask("B", "which of the following is right?" + choices),
        ask("E", "how long?" + choices),
        ask("15", "how long?" + choices),
    ]
    done, left = difficulty.free_response([good, lone, *bad])
    assert left == bad and done[1] is lone
    assert done[0].facts["answer"] == "15" == done[0].messages[-1].parts[0]
    assert done[0].messages[0].parts == ("how long is the side?",)


@pytest.fixture
def scripted(monkeypatch, encoder):
    """generate() that says, for prompt i, these texts."""

    def say(*texts_of_prompt):
        def generate(model, prompts, end, max_new, tries, temperature, seed):
            return [
                Answer(i, encoder.tokenizer.encode(t) + [end], [], True)
                for i, texts in enumerate(texts_of_prompt)
                for t in texts
            ]

        monkeypatch.setattr(difficulty, "generate", generate)

    return say


def test_pass_rates_and_rejection_sampling_count_only_right_whole_answers(
    scripted, encoder, monkeypatch
):
    monkeypatch.setattr(difficulty, "text_of", lambda a, tokenizer: tokenizer.decode(a.ids[:-1]))
    samples = [ask("3"), ask("4")]
    right, wrong, bare = "<think>b</think>\\boxed{3}", "<think>b</think>\\boxed{5}", "\\boxed{3}"
    scripted([wrong, bare, right, "<think>c</think>\\boxed{3}"], [wrong] * 4)
    assert difficulty.solved(None, encoder, samples) == [0.75, 0.0]
    harvest = chains.rejection_sample(None, encoder, samples)
    assert (
        len(harvest) == 1
        and harvest[0].messages[-1].think == "b"
        and harvest[0].messages[-1].parts == ("\\boxed{3}",)
    )
    assert harvest[0].messages[0].parts[-1].endswith(encoder.tokenizer.think_prompt)


def test_a_blend_holds_its_share_and_uses_chains_evenly():
    direct, pool = (ask("d") for _ in iter(int, 1)), [ask(str(i)) for i in range(7)]
    drawn = [s.facts["answer"] for s in islice(chains.blend(direct, pool, 0.1, seed=3), 4000)]
    counts = [drawn.count(str(i)) for i in range(7)]
    assert 0.08 < sum(counts) / 4000 < 0.12 and max(counts) - min(counts) <= 1
    with pytest.raises(ValueError, match="no chain survived"):
        next(chains.blend(iter([]), [], 0.1))


def test_a_real_model_is_asked_and_graded(model, encoder):
    samples = [world.sample(i, 0, {"counting": 1.0}, turns=1) for i in range(2)]
    assert difficulty.solved(model, encoder, samples, tries=2, max_new=4) == [0.0, 0.0]
