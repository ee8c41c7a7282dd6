"""Annotators behind an address: nothing is lost, nothing is asked twice, no key is told."""

import json
import logging
import os
import random
import time

import annotating
import pytest
from annotating import (
    KEY,
    RoughServer,
    asking,
    everything_in,
    in_child,
    kept_numbers,
    kill,
    numbers,
    outputs,
    reasons_of,
    run_asking,
    usable,
)
from PIL import Image
from ranks_helpers import as_ranks

from curation.annotators import (
    AnnotatorOptions,
    Endpoint,
    chat_of,
    open_annotator,
    opened_pictures,
)
from curation.requests import Prompts, Request, json_in
from data.readers import Folder
from data.sample import Message, Sample, Video
from infra import endpoint
from infra.endpoint import ChatEndpoint, Spacing, question_key, usage_in
from infra.replies import ReplyCache


@pytest.fixture
def serve(monkeypatch):
    """A function that starts servers; pauses between attempts are short; there is a key."""
    monkeypatch.setattr(endpoint, "FIRST_PAUSE", 0.01)
    monkeypatch.setenv("MY_KEY", KEY)
    servers = []

    def start(**how):
        servers.append(RoughServer(**how))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def check_books(count, out, server):
    """Every record is kept or has a reason; good replies were all used and asked for once."""
    expected = [number for number in range(count) if usable(number)]
    assert kept_numbers(out) == expected
    assert reasons_of(out) == {"no reply": count - len(expected)}
    history = [json.loads(x) for x in out.with_suffix(".history.jsonl").read_text().splitlines()]
    assert [line["index"] for line in history] == list(range(count))
    assert server.answered == dict.fromkeys(expected, 1)
    folder = Folder(out)
    assert len(folder) == len(expected) and not folder.faults.counts


def check_key(folder, *texts):
    assert KEY.encode() not in everything_in(folder)
    assert KEY not in "".join(texts)


# --------------------------------------------------------------------------------- a rough server


def run_roughly(serve, tmp_path, caplog, capfd, count, stall, **options):
    data = numbers(tmp_path / "data", count)
    server = serve(stall=stall)
    out = tmp_path / "out.jsonl"
    with caplog.at_level(logging.DEBUG):
        outcome, annotator = run_asking(asking(data, out, server, **options))
    check_books(count, out, server)

    # Once more: only what had no reply is asked again
    asked = len(server.sent)
    before = outputs(out)
    again, _ = run_asking(asking(data, out, server, **options))
    assert not any(usable(number) for number in server.sent[asked:])
    assert outputs(out) == before and "had no reply" in again.report()

    printed = capfd.readouterr()
    check_key(tmp_path, caplog.text, printed.out, printed.err, outcome.report(), annotator.report())
    counts = annotator.chat.counts
    assert counts.asked == count and counts.failed == count - outcome.written
    return counts


def test_nothing_is_lost_nothing_asked_twice_and_the_key_is_told_nobody(
    serve, tmp_path, caplog, capfd
):
    # (without those that stall, which take their time)
    how = {"timeout": 20.0, "at_once": 32, "chunk": 128}
    counts = run_roughly(serve, tmp_path, caplog, capfd, 100, stall=0, **how)
    assert 500 < counts.sent < 1500 and 100 < counts.written < 300


@pytest.mark.slow
def test_two_thousand_requests_to_a_rough_server(serve, tmp_path, caplog, capfd):
    how = {"timeout": 10.0, "at_once": 32, "chunk": 256}
    run_roughly(serve, tmp_path, caplog, capfd, 2004, stall=10.0, **how)


# ------------------------------------------------------------------------------------------ kills


def killed_and_resumed(serve, tmp_path, count, kills, **options):
    """Runs that are killed, each at a random moment; then one that ends, equal to an undisturbed one."""
    data = numbers(tmp_path / "data", count, pictures=False)
    undisturbed = tmp_path / "undisturbed" / "out.jsonl"
    run_asking(asking(data, undisturbed, serve(), **options))

    server = serve(latency=0.01)
    out = tmp_path / "killed" / "out.jsonl"
    cache = out.with_suffix(".replies.jsonl")
    moments = random.Random(1)
    for _ in range(kills):
        # Told apart by what the cache held when it began
        known = cached_numbers(cache)
        began = len(server.sent)
        child = in_child(lambda: run_asking(asking(data, out, server, **options)))
        until = began + moments.randrange(1, 2 * count // kills)
        patience = time.monotonic() + 20
        while len(server.sent) < until and time.monotonic() < patience:
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.02))
        assert kill(child) in (-9, 0)
        assert not known & set(server.sent[began:])

    # The end: nothing that was answered and kept is asked again
    known = cached_numbers(cache)
    began = len(server.sent)
    run_asking(asking(data, out, server, **options))
    assert not known & set(server.sent[began:])
    assert outputs(out) == outputs(undisturbed)
    twice = sum(server.answered.values()) - len(server.answered)
    assert twice <= kills * options["at_once"]
    check_key(tmp_path)
    return twice


def cached_numbers(cache):
    if not cache.exists():
        return set()
    lines = [line for line in cache.read_bytes().split(b"\n")[:-1] if line.endswith(b"]")]
    texts = [json.loads(line)[1] for line in lines]
    return {int(text.removeprefix("?").split()[2]) for text in texts}


def test_killed_runs_go_on_without_asking_again(serve, tmp_path):
    killed_and_resumed(serve, tmp_path, 48, 2, timeout=20.0, at_once=8, chunk=16)


@pytest.mark.slow
def test_a_run_of_two_thousand_is_killed_ten_times(serve, tmp_path):
    twice = killed_and_resumed(serve, tmp_path, 2004, 10, timeout=20.0, at_once=32, chunk=256)
    print(f"in flight when killed, and asked again: {twice}")


def test_two_processes_at_once_ask_each_question_once(serve, tmp_path):
    data = numbers(tmp_path / "data", 40, pictures=False)
    server = serve(latency=0.05, rough=False)
    cache = tmp_path / "both.jsonl"
    children = []
    for name in "ab":
        options = asking(data, tmp_path / name / "out.jsonl", server, cache=cache)
        children.append(in_child(lambda options=options: run_asking(options)))
    ends = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert ends == [0, 0] and server.answered == dict.fromkeys(range(40), 1)
    assert outputs(tmp_path / "a" / "out.jsonl") == outputs(tmp_path / "b" / "out.jsonl")


def test_two_ranks_share_a_server_and_its_replies(serve, tmp_path):
    data = numbers(tmp_path / "data", 24, pictures=False)
    server = serve(rough=False)
    options = [asking(data, tmp_path / name / "out.jsonl", server, chunk=4) for name in "ab"]
    said = as_ranks(lambda ranks: run_asking(options[0])[0].written, tmp_path / "said")
    assert said == [24, 24] and server.answered == dict.fromkeys(range(24), 1)
    run_asking(options[1])
    assert outputs(options[0].out) == outputs(options[1].out)


def test_a_claim_ends_with_its_process_and_after_some_patience(tmp_path):
    cache = ReplyCache(tmp_path / "replies.jsonl")
    key = question_key("m", "x", [])

    def claim_and_wait():
        with ReplyCache(cache.path).claimed(key, 0):
            (tmp_path / "claimed").write_text("")
            time.sleep(60)

    child = in_child(claim_and_wait)
    while not (tmp_path / "claimed").exists():
        time.sleep(0.01)
    assert not cache._claim(key)
    with cache.claimed(key, 0.1):
        assert not cache._claim(key)  # went on without it
    kill(child)
    assert cache._claim(key)


# ------------------------------------------------------------------------------------ one endpoint


def number_request(number, *pictures, root=None):
    sample = Sample((Message("user", ("?",)),), "", "here:1", root=root)
    return Request("number", {"number": str(number)}, pictures, sample)


@pytest.fixture
def prompts(tmp_path):
    numbers(tmp_path, 1)
    return tmp_path / "prompts"


def test_responses_come_in_order_with_pictures_and_faults(serve, prompts, tmp_path):
    server = serve(rough=False)
    told = AnnotatorOptions(url=server.url, name="m", prompts=prompts, max_new=7)
    annotator = open_annotator(told)
    requests = [
        number_request(1, Image.new("RGB", (4, 4)), "red.png", root=tmp_path),
        number_request(2, "../gone.png", root=tmp_path),
        number_request(3, b"no picture"),
        number_request(4),
        number_request(5, Video((Image.new("RGB", (4, 4)), "red.png")), root=tmp_path),
    ]
    first, outside, broken, last, video = annotator.annotate(requests)
    assert (first.text, last.text) == ("it is 1", "it is 4")
    assert outside.text is broken.text is None
    assert outside.fault.startswith("path outside the image folder: here:1")
    assert broken.fault.startswith("unreadable image: here:1")
    assert video.text == "it is 5" and len(opened_pictures(requests[-1])) == 2
    assert sorted(server.sent) == [1, 4, 5] and annotator.name == "m"
    assert "3 asked" in annotator.report() and "40 tokens sent, 8 written" in annotator.report()


def test_an_answer_without_an_end_is_half_of_one_also_from_the_cache(serve, prompts, tmp_path):
    server = serve(rough=False)
    server.answer = lambda handler, number, content: server.write(
        handler, 200, content.replace(b'"stop"', b'"length"')
    )
    given = AnnotatorOptions(
        url=server.url, name="m", prompts=prompts, max_new=7, cache=tmp_path / "replies.jsonl"
    )
    for _ in range(2):
        (response,) = Endpoint(chat_of(given), Prompts(prompts)).annotate([number_request(5)])
        assert response.text is None and response.fault == "no end within 7 tokens"
    assert server.sent == [5]


def test_a_prompt_that_cannot_be_filled_ends_the_run_with_its_name(serve, prompts):
    (prompts / "number.txt").write_text("$who is $number")
    annotator = open_annotator(AnnotatorOptions(url=serve().url, name="m", prompts=prompts))
    with pytest.raises(ValueError, match="prompt number.txt: no field 'who'"):
        annotator.annotate([number_request(1)])
    (prompts / "number.txt").write_text("$ 5")
    annotator = open_annotator(AnnotatorOptions(url=serve().url, name="m", prompts=prompts))
    with pytest.raises(ValueError, match=r"prompt number.txt: write \$\$"):
        annotator.annotate([number_request(1)])


def test_nobody_there_or_nobody_named_is_one_line(serve, monkeypatch):
    server = serve()
    server.http.server_close()
    with pytest.raises(ValueError, match="the annotator at 127.0.0.1 does not answer"):
        open_annotator(AnnotatorOptions(url=server.url, name="m", timeout=0.5, retries=0))
    for wrong, word in [({"name": ""}, "--annotator.name"), ({"max_new": 0}, "max-new")]:
        options = AnnotatorOptions(**({"url": server.url, "name": "m"} | wrong))
        with pytest.raises(ValueError, match=word):
            open_annotator(options)
    for wrong in ({"retries": -1}, {"timeout": 0}, {"at_once": 0}, {"per_minute": -1}):
        with pytest.raises(ValueError, match="must not be negative"):
            chat_of(AnnotatorOptions(url=server.url, name="m", **wrong))
    with pytest.raises(ValueError, match="name one annotator"):
        open_annotator(AnnotatorOptions())


def test_tokens_and_dollars_are_those_that_the_server_counts(serve):
    server = serve(rough=False)
    ask = ChatEndpoint(server.url, "m", role="annotator", prices=(1000.0, 5e5))
    assert ask("number 1") == "it is 1" and ask("number 1") == "it is 1"
    assert (ask.counts.sent, ask.counts.written) == (10, 2)
    assert ask.dollars() == pytest.approx(0.01 + 1.0)
    assert "10 tokens sent, 2 written, $1.01" in ask.report()
    for hostile in (None, [], 7, {"usage": 3}, {"usage": {"prompt_tokens": True}}):
        assert usage_in(hostile) == (0, 0)
    assert usage_in({"usage": {"prompt_tokens": 3, "completion_tokens": 1e9}}) == (3, 0)


def test_what_is_asked_for_beside_the_words_is_sent_and_is_part_of_the_key():
    body = json.loads(
        endpoint.request_body("m", "x", [b"1", b"2"], {"temperature": 0.5, "max_tokens": 9})
    )
    assert body["temperature"] == 0.5 and body["max_tokens"] == 9
    assert [part["type"] for part in body["messages"][0]["content"]] == ["image_url"] * 2 + ["text"]
    plain = question_key("m", "x", [])
    assert question_key("m", "x", [], {"temperature": 0.0}) == plain  # older caches stay true
    others = [{"temperature": 0.5}, {"temperature": 0.0, "max_tokens": 9}]
    assert len({plain, *(question_key("m", "x", [], other) for other in others)}) == 3


def test_requests_leave_at_their_pace(monkeypatch):
    pauses = []
    monkeypatch.setattr(endpoint.time, "monotonic", lambda: 100.0)
    monkeypatch.setattr(endpoint, "wait_for", pauses.append)
    pace = Spacing(per_minute=120)
    for _ in range(3):
        pace.wait()
    pace.hold(9)
    pace.wait()
    pace.wait()
    free = Spacing()
    free.wait()
    free.wait()
    assert pauses == [0, 0.5, 1, 9, 9.5, 0, 0]


def test_a_full_server_costs_time_and_no_attempts(serve, monkeypatch):
    server = serve()
    monkeypatch.setitem(vars(annotating), "PLANS", [["429"] * 4 + ["good"]])
    ask = ChatEndpoint(server.url, "m", retries=1)
    assert ask("number 0") == "it is 0" and len(server.sent) == 5


def test_a_server_that_refuses_questions_is_not_down(serve, monkeypatch):
    server = serve()
    monkeypatch.setitem(vars(annotating), "PLANS", [["400"]] * 20 + [["500", "good"]])
    ask = ChatEndpoint(server.url, "m", at_once=1)
    assert ask.ask_all([f"number {number}" for number in range(21)])[-1] == "it is 20"


def test_no_half_of_a_key_is_told(serve, caplog):
    failure = endpoint.without_key("x" * 290 + KEY, KEY)[:300]
    assert KEY[:8] not in failure
    short = endpoint.reply_in(json.loads(annotating.said("an EMPTY box")), "EMPTY")
    assert short.text == "an EMPTY box"


def test_json_in_a_reply_is_found_and_what_is_none_is_not():
    assert json_in('Sure:\n```json\n{"score": 3}\n```') == {"score": 3}
    for text in ("", "no", '{"score": NaN}', '{"score": 1e999}', "[" * 10**5, "[" + "9" * 5000):
        assert json_in(text) is None
