"""Talking: what a person types is understood, nothing that goes wrong ends the talk, and every answer is the
one that the model gives to the same messages."""

import io
import os
import select
import signal
import subprocess
import sys
import termios
import threading
import time
import traceback
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from PIL import Image

import talk.chat
from data import world
from data.encode import Encoder
from data.images import frames_of
from data.sample import BadSample, Message, Sample, Video
from generate import generate, load_model, user_turn
from infra.text import printable
from talk import interrupts, samples
from talk.chat import AGAIN, ChatOptions, Screen, Talk, chat, tail_of, take_line
from talk.interrupts import Interrupts
from talk.typed import read_picture, split_command, split_pictures
from vlm import SailVL

pty = pytest.importorskip("pty")
LIMIT = 60  # seconds that a session may keep silent


@pytest.fixture(scope="module")
def directory(config, tokenizer, tmp_path_factory) -> Path:
    """A saved model, random, that never says an image token."""
    place = tmp_path_factory.mktemp("model")
    model = SailVL(config).init_weights(0)
    with torch.no_grad():
        model.language_model.lm_head.weight[tokenizer.image] = 0
    model.save_pretrained(place)
    tokenizer.save(place)
    return place


@pytest.fixture
def pictures(tmp_path, monkeypatch) -> Path:
    """A folder where one stands: a picture, one whose name has spaces, a video as a GIF and as a folder."""
    colours = [(20 * i, 200, 0) for i in range(3)]
    frames = [Image.new("RGB", (32, 32), colour) for colour in colours]
    frames[0].save(tmp_path / "cat.png")
    frames[1].save(tmp_path / "my cat.png")
    frames[0].save(tmp_path / "clip.gif", save_all=True, append_images=frames[1:])
    (tmp_path / "clip").mkdir()
    for i, frame in enumerate(frames):
        frame.save(tmp_path / "clip" / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def told(*answers: list[int]):
    """A `stream` that says these tokens, one list for each call."""
    waiting = iter(answers)

    def stream(*arguments, **how):
        for token in next(waiting):
            yield torch.tensor([0]), torch.tensor([token]), torch.tensor([0.0])

    return stream


# ------------------------------------------------------------------------------------------ a terminal


class Session:
    """A chat at the other end of a pseudo-terminal."""

    def __init__(self, options: ChatOptions, environment: dict[str, str]):
        self.text = ""
        self.child, self.terminal = pty.fork()
        if self.child == 0:
            become_chat(options, environment)

        # Ctrl-C empties a terminal's queues: what the chat answers to it could be lost with them
        modes = termios.tcgetattr(self.terminal)
        modes[3] |= termios.NOFLSH
        termios.tcsetattr(self.terminal, termios.TCSANOW, modes)
        self.until("> ")

    def until(self, mark: str) -> str:
        """What is written until it ends with the mark."""
        begin = len(self.text)
        end = time.monotonic() + LIMIT
        while not self.text[begin:].endswith(mark):
            ready, _, _ = select.select([self.terminal], [], [], end - time.monotonic())
            if not ready:
                os.kill(self.child, signal.SIGKILL)
                raise AssertionError(f"nothing came after {self.text!r}")
            self.text += self.read()
        return self.text[begin:]

    def read(self) -> str:
        """Some text; Linux says "input/output error" at the end."""
        try:
            return os.read(self.terminal, 65536).decode()
        except OSError:
            raise AssertionError(f"the chat ended after {self.text!r}") from None

    def interrupt(self) -> str:
        """What is written after Ctrl-C, pressed once."""
        os.write(self.terminal, b"\x03")
        return self.until(")\r\n> ")

    def type(self, line: str) -> list[str]:
        """What is written after a line that is typed, as lines without the echo."""
        os.write(self.terminal, line.encode() + b"\n")
        return self.until("\n> ").replace("\r\n", "\n").split("\n")[1:-1]

    def leave(self, keys: str = "/quit\n") -> int:
        """The exit status after these keys."""
        os.write(self.terminal, keys.encode())
        return os.waitstatus_to_exitcode(os.waitpid(self.child, 0)[1])


def become_chat(options: ChatOptions, environment: dict[str, str]) -> None:
    """In the child: the terminal is this process's, and it ends with the chat."""
    status = 70
    try:
        os.environ.pop("NO_COLOR", None)
        os.environ.update(environment)
        sys.stdin = open(0, closefd=False)
        sys.stdout = open(1, "w", buffering=1, closefd=False)
        status = chat(options)
    except BaseException:
        print(traceback.format_exc(), flush=True)
    finally:
        os._exit(status)


def test_a_session_in_a_terminal(directory, pictures):
    """A picture, three turns, think on, a video, a bad path, reset: all answers are those of `generate`."""
    model, tokenizer = load_model(directory)
    encoder = Encoder(tokenizer, model.config)
    messages: list[Message] = []

    def answer_to(*question) -> str:
        """What the model says to the talk and this question; both become part of it."""
        messages.append(user_turn(*question))
        prompt = encoder.prompt(Sample(tuple(messages)), reply=True)
        ids = generate(model, [prompt], tokenizer.ends, max_new=6)[0].ids
        text = tokenizer.decode_answer(ids)
        messages.append(Message("assistant", (text,)))
        return printable(text, lines=True)

    session = Session(ChatOptions(directory, max_new=6), {"TERM": "dumb"})
    cat = read_picture(pictures / "cat.png", 16)
    clip = read_picture(pictures / "clip.gif", 16)

    def said(line: str) -> str:
        lines = session.type(line)
        cut = lines[-1].startswith("(cut off after 6 tokens")
        return "\n".join(lines[:-1] if cut else lines)

    assert said("cat.png what is it?") == answer_to([cat], "what is it?")
    assert said("where is it?") == answer_to([], "where is it?")
    assert session.type("/think on") == ["thinking is on"]
    thinking = f"how many? {tokenizer.think_prompt}"
    assert said("how many?") == answer_to([], thinking)
    assert session.type("/think off") == ["thinking is off"]
    assert said("clip.gif which way?") == answer_to([clip], "which way?")

    # a bad path is one line, and changes nothing
    assert session.type("gone.png what?") == ["error: missing image: picture: no file gone.png"]
    assert said("why?") == answer_to([], "why?")

    # without what was said before
    assert session.type("/reset") == ["everything is forgotten"]
    messages.clear()
    assert said("where is it?") == answer_to([], "where is it?")
    assert session.leave() == 0


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"TERM": "xterm", "NO_COLOR": "1"}])
def test_a_plain_terminal_gets_text_alone(directory, pictures, environment, monkeypatch, tokenizer):
    thinks = [tokenizer.think, *tokenizer.encode("one two"), tokenizer.unthink]
    answer = [*thinks, *tokenizer.encode("2"), tokenizer.end]
    monkeypatch.setattr(talk.chat, "stream", told(answer))
    session = Session(ChatOptions(directory), environment)
    count = len(thinks) - 2
    folded = f"(thought for {count} tokens; /history shows them)"
    assert session.type("cat.png how many?") == ["(thinking)", folded, "2"]
    assert session.leave("\x04") == 0
    written = session.text.replace("\x1b[?2004h", "").replace("\x1b[?2004l", "")  # readline's own
    assert "\x1b" not in written


def test_thoughts_are_dimmed_on_one_line_and_folded(directory, monkeypatch, tokenizer):
    thinks = [tokenizer.think, *tokenizer.encode("one two"), tokenizer.unthink]
    monkeypatch.setattr(talk.chat, "stream", told([*thinks, *tokenizer.encode("2"), tokenizer.end]))
    session = Session(ChatOptions(directory, think=True), {"TERM": "xterm", "COLUMNS": "40"})
    written = "\n".join(session.type("how many?"))
    *steps, last = written.split(AGAIN)[1:]
    assert all(step.startswith("\x1b[2m... ") for step in steps)  # each over the one before
    assert steps[-1] == "\x1b[2m... one two\x1b[0m"
    assert last.startswith("\x1b[2m(thought for ") and last.endswith("\n2")
    history = session.type("/history")
    assert any("thought: one two" in line for line in history)
    assert session.leave() == 0


def test_control_c_ends_the_answer_and_not_the_talk(directory, monkeypatch, tokenizer):
    red, blue = tokenizer.encode("red"), tokenizer.encode("blue")

    def stream(*arguments, **how):
        first = not calls
        calls.append(1)
        for token in red:
            yield torch.tensor([0]), torch.tensor([token]), torch.tensor([0.0])
        if first:
            while True:  # until the key is pressed; a pause would miss one that came before it
                time.sleep(0.01)
        yield torch.tensor([0]), torch.tensor(blue[:1]), torch.tensor([0.0])

    calls: list[int] = []
    monkeypatch.setattr(talk.chat, "stream", stream)
    session = Session(ChatOptions(directory), {"TERM": "dumb"})
    os.write(session.terminal, b"what?\n")
    session.until("red")
    assert "(ended)" in session.interrupt()
    assert session.type("what?")[0].startswith("red")
    assert "red" in session.type("/history")  # what was said until then stays

    # on an empty line it only says how to leave, however often it is pressed
    for _ in range(30):
        assert "leaves" in session.interrupt()
    assert session.leave("\x04") == 0


def press_unnoticed() -> None:
    """A press that the main thread does not hear of: C hears it in another thread, as it does between
    the moment at which `input` has looked for signals and the one at which it waits."""

    def press() -> None:
        time.sleep(0.05)  # until the main thread waits
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)

    threading.Thread(target=press).start()


def test_a_press_that_comes_too_early_is_heard_all_the_same():
    before = signal.getsignal(signal.SIGINT)  # a shell may have started us deaf
    began = time.monotonic()
    with Interrupts() as listening:
        press_unnoticed()
        with pytest.raises(KeyboardInterrupt), listening.expected():
            select.select([], [], [], LIMIT)
    assert time.monotonic() - began < LIMIT / 2
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_press_does_not_interrupt_what_deals_with_the_first(monkeypatch):
    monkeypatch.setattr(interrupts, "PAUSE", LIMIT)
    dealt_with = False
    with Interrupts() as listening:
        with listening.expected():
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                signal.raise_signal(signal.SIGINT)
                dealt_with = True
        signal.raise_signal(signal.SIGINT)  # nobody expects it: it waits
        with pytest.raises(KeyboardInterrupt), listening.expected():
            raise AssertionError("entered")
        with listening.expected():
            assert dealt_with


def test_a_question_that_is_interrupted_before_its_answer_is_no_turn(a_talk, monkeypatch):
    def interrupted(*arguments) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(talk.chat, "print_answer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        take_line(a_talk, Screen(), "what?")
    assert a_talk.exchanges == []


# ----------------------------------------------------------------------------------------------- a pipe


def piped(monkeypatch, lines: bytes, options: ChatOptions) -> int:
    """The exit status of a chat that reads these bytes."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8"))
    return chat(options)


def test_through_a_pipe_answers_alone_are_on_stdout(directory, pictures, monkeypatch, capsys):
    options = ChatOptions(directory, max_new=4)
    assert piped(monkeypatch, b"what?\n\n  \n'my cat.png' what?", options) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") >= 2 and "\x1b" not in out + err
    assert err.splitlines() == ["(cut off after 4 tokens: --max-new)"] * 2

    assert piped(monkeypatch, b"/nonsense\nwhat?\n", options) == 1
    again, err = capsys.readouterr()
    assert out.startswith(again)
    assert err.startswith("error: /nonsense: no such command; /help lists them\n")


def test_control_c_ends_a_pipe(directory, monkeypatch, capsys):
    def stream(*arguments, **how):
        yield torch.tensor([0]), torch.tensor([100]), torch.tensor([0.0])
        raise KeyboardInterrupt

    monkeypatch.setattr(talk.chat, "stream", stream)
    assert piped(monkeypatch, b"what?\nwhat?\n", ChatOptions(directory)) == 130
    assert "(ended)" not in capsys.readouterr().err


def test_options_that_leave_nothing_to_say_are_errors(directory):
    for name in ("max_new", "frames"):
        with pytest.raises(ValueError, match="must be at least 1"):
            chat(ChatOptions(directory, **{name: 0}))


def test_bytes_that_are_no_text_do_not_end_the_talk(directory, monkeypatch, capsys):
    lines = b"\xff\xfe what?\n\xff.png what?\n\0.png?\n" + b"x" * 5000 + b".png\nwhat?\n"
    assert piped(monkeypatch, lines, ChatOptions(directory, max_new=2)) == 1
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 3 and "\0" not in err
    assert out.count("\n") == 2


def test_what_others_wrote_cannot_steer_the_terminal(
    directory, pictures, monkeypatch, capsys, tokenizer
):
    (pictures / "a\x1b[2J.png").write_text("no picture")
    hostile = [*tokenizer.encode("red\x1b[2Jcar"), tokenizer.end]
    monkeypatch.setattr(talk.chat, "stream", told(hostile))
    piped(monkeypatch, b"a\x1b[2J.png what?\nwhat?\n/history\n", ChatOptions(directory))
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err
    assert "red\\x1b[2Jcar\n" in out and "unreadable image: picture: a\\x1b[2J.png" in err


# ----------------------------------------------------------------------------------------- what is typed


@pytest.mark.parametrize(
    "line, names, words",
    [
        ("cat.png what is it?", ["cat.png"], "what is it?"),
        ("what is in cat.png?", ["cat.png"], "what is in?"),
        ("is 'my cat.png' larger than cat.png, or not?", ["my cat.png", "cat.png"], None),
        ('"my cat.png" what?', ["my cat.png"], "what?"),
        (r"my\ cat.png what?", ["my cat.png"], "what?"),
        ("my cat.png", ["my cat.png"], ""),
        ("cat.png clip.gif", ["cat.png", "clip.gif"], ""),
        ("{here}/cat.png what?", ["{here}/cat.png"], "what?"),
        ("file://{here}/my%20cat.png what?", ["{here}/my cat.png"], "what?"),
        ("clip/ which way?", ["clip/"], "which way?"),
        ("./clip which way?", ["./clip"], "which way?"),
        ("gone.JPG what?", ["gone.JPG"], "what?"),
        # words that are no pictures
        ("what's in the clip  file?", [], "what's in the clip  file?"),
        ("is 3/4 more than 1/2 / or . less than '~'?", [], None),
        ("is it a .png or a gif?", [], None),
        ("它是什么?", [], "它是什么?"),
    ],
)
def test_pictures_are_found_among_words(line, names, words, pictures):
    line = line.format(here=pictures)
    paths, left = split_pictures(line)
    assert [str(path) for path in paths] == [
        str(Path(name.format(here=pictures))) for name in names
    ]
    if words is not None:
        assert left == words
    if not names:
        assert left == line


def test_a_home_is_expanded_and_an_address_is_refused(pictures, monkeypatch):
    monkeypatch.setenv("HOME", str(pictures))
    assert split_pictures("~/cat.png what?")[0] == [pictures / "cat.png"]
    with pytest.raises(ValueError, match="https://x.org/a.png: only files are read here"):
        split_pictures("what is https://x.org/a.png")


@pytest.mark.parametrize(
    "line, command, rest",
    [
        ("/think on", "think", "on"),
        ("  /help ", "help", ""),
        ("/nonsense", "nonsense", ""),
        ("/tmp what is there?", "", "/tmp what is there?"),
        ("/a/b.png what?", "", "/a/b.png what?"),
        ("what /think", "", "what /think"),
    ],
)
def test_a_command_is_told_from_a_path(line, command, rest):
    assert split_command(line) == (command, rest)


def test_pictures_are_read_when_they_are_named(pictures):
    assert isinstance(read_picture(pictures / "cat.png", 16), Image.Image)
    for name in ("clip", "clip.gif"):
        video = read_picture(pictures / name, 2)
        assert isinstance(video, Video) and len(video.source) == 2
        assert len(frames_of(video, None, "")) == 2
    (pictures / "empty").mkdir()
    (pictures / "text.png").write_text("hello")
    for name in ("empty", "text.png", "gone.png"):
        with pytest.raises(BadSample):
            read_picture(pictures / name, 16)


# ------------------------------------------------------------------------------------------ the talk


@pytest.fixture
def a_talk(directory) -> Talk:
    model, tokenizer = load_model(directory)
    return Talk(model, tokenizer, ChatOptions(directory, max_new=4))


def typed(a_talk: Talk, capsys, line: str) -> str:
    take_line(a_talk, Screen(), line)
    said = capsys.readouterr()
    return said.out + said.err


def test_pictures_wait_for_the_next_question(a_talk, pictures, capsys):
    assert "cat.png: picture 32 x 32, waits for a question" in typed(a_talk, capsys, "cat.png")
    assert "video of 3 frames, waits" in typed(a_talk, capsys, "/image clip")
    assert typed(a_talk, capsys, "/image") == "waits: picture 32 x 32\nwaits: video of 3 frames\n"
    typed(a_talk, capsys, "what?")
    assert len(a_talk.exchanges[0].pictures) == 2 and a_talk.waiting == []
    assert "turn 1: picture" in typed(a_talk, capsys, "/image")

    typed(a_talk, capsys, "cat.png")
    assert typed(a_talk, capsys, "/image none") == "no picture waits\n" and a_talk.waiting == []
    with pytest.raises(BadSample, match="no file words"):  # all or none
        take_line(a_talk, Screen(), "/image cat.png words")
    assert a_talk.waiting == []
    with pytest.raises(ValueError, match="/think maybe: on or off"):
        take_line(a_talk, Screen(), "/think maybe")


def test_earlier_thoughts_are_not_read_again(a_talk, monkeypatch, capsys):
    tokenizer = a_talk.encoder.tokenizer
    chain = [tokenizer.think, *tokenizer.encode("secret"), tokenizer.unthink]
    answer = [*chain, *tokenizer.encode("blue"), tokenizer.end]
    monkeypatch.setattr(talk.chat, "stream", told(answer, answer))
    typed(a_talk, capsys, "what?")
    typed(a_talk, capsys, "and now?")
    assert a_talk.exchanges[0].thought == "secret" and a_talk.exchanges[0].ids == answer
    ids, _ = a_talk.encoder.prompt(a_talk.exchanges[1].sample, reply=True)
    text = tokenizer.decode(ids)
    assert "blue" in text and "secret" not in text


def test_a_question_that_could_not_be_answered_is_no_turn(a_talk, monkeypatch, capsys):
    def stream(*arguments, **how):
        raise torch.OutOfMemoryError("no room")
        yield

    monkeypatch.setattr(talk.chat, "stream", stream)
    screen = Screen()
    talk.chat.try_line(a_talk, screen, "what?")
    assert screen.failed and "not enough memory for this talk" in capsys.readouterr().err
    assert a_talk.exchanges == []


def test_the_oldest_turn_is_forgotten_when_the_talk_grows_too_long(a_talk, capsys):
    a_talk.options = replace(a_talk.options, context=60)
    for number in range(6):
        said = typed(a_talk, capsys, f"what is {number}?")
    assert "the oldest turn is forgotten" in said
    assert 1 < len(a_talk.exchanges) < 6
    with pytest.raises(ValueError, match="more than --context 60"):
        take_line(a_talk, Screen(), "what? " * 60)


def test_show_writes_what_the_last_answer_looked_at(a_talk, pictures, capsys):
    with pytest.raises(ValueError, match="nothing was answered yet"):
        take_line(a_talk, Screen(), "/show a.html")
    typed(a_talk, capsys, "cat.png what?")
    typed(a_talk, capsys, "why?")
    with pytest.raises(ValueError, match="a.txt: where it looked is a page"):
        take_line(a_talk, Screen(), "/show a.txt")
    said = typed(a_talk, capsys, "/show new/a.html")
    assert said.splitlines()[-1] == "where it looked: new/a.html"
    assert len(said.splitlines()) == 1 + 4 + 1
    page = (pictures / "new" / "a.html").read_text()
    assert page.count('class="token"') == 5 and "<h1>why?</h1>" in page


def test_a_long_thought_shows_its_end_in_the_columns_that_there_are():
    assert tail_of("one two three", 5) == "three"
    assert tail_of("short", 40) == "short"
    assert tail_of("一二三四", 5) == "三四"  # two columns each


def test_a_chat_without_readline_still_talks(directory, monkeypatch, capsys):
    monkeypatch.setattr(talk.chat, "readline", None)
    assert piped(monkeypatch, b"/help\n/history\n/quit\nwhat?\n", ChatOptions(directory)) == 0
    out, err = capsys.readouterr()
    assert out == "" and "/think on|off" in err and "nothing was said yet" in err


# ----------------------------------------------------------------------------------------------- samples


def test_sample_pictures_are_held_out_and_their_answers_true(tmp_path, capsys):
    shown = samples.taught(seed=0, each=2)
    assert len(shown) == 2 * len(world.KINDS)
    samples.draw_samples(samples.SampleOptions(tmp_path, each=1))
    printed = capsys.readouterr().out
    for one in samples.taught(0, 1) + samples.beyond():
        assert one.asked and f"{tmp_path / one.file}\n" in printed
        for question, truth in one.asked:
            assert f"    {question}  truth: {truth}\n" in printed
        assert not one.why or f"    why: {one.why}\n" in printed
        with Image.open(tmp_path / one.file) as picture:
            assert getattr(picture, "n_frames", 1) == len(one.frames)
    assert (tmp_path / "questions.txt").read_text() == printed
    assert (tmp_path / "sheet.png").is_file()

    # a true answer names what the caption says
    dots = next(one for one in shown if one.name == "dots-1")
    caption, count = (truth for _, truth in dots.asked)
    assert caption.endswith(f"dots {count}")


def test_what_the_list_says_of_the_toys_world_is_so():
    words = {one.name: one.why for one in samples.beyond()}
    assert all(colour in words["beyond-colour"] for colour in world.COLORS)
    assert all(shape in words["beyond-shape"] for shape in world.SHAPES)
    assert len(world.CHARACTERS) == 20 and "twenty" in words["beyond-letters"]
    assert not set("dog") & set(world.CHARACTERS)
    counts = [len(world.DotScene(world.random.Random(i)).cells) for i in range(300)]
    assert max(counts) == 6 and "six" in words["beyond-six"]
    assert world.SIDE == 2 and world.SIZE == 32


def test_a_model_is_asked_about_every_sample(directory):
    shown = samples.taught(0, 1)[:2] + samples.beyond()[:1]
    said = samples.answers_of(directory, shown)
    assert len(said) == sum(len(one.asked) for one in shown)
    text = samples.listing(shown, Path("x"), said)
    assert text.count("; it said: ") == len(said) and "\x1b" not in text


@pytest.mark.slow
def test_a_real_pipe(directory, pictures):
    done = subprocess.run(
        [sys.executable, "-m", "talk.chat", "--model", directory, "--max-new", "3"],
        cwd=ROOT,
        input=f"{pictures}/cat.png what?\n/image {pictures}/gone.png\nwhy?\n".encode(),
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 1 and done.stdout.count(b"\n") == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith(b"error: ")]
    assert len(errors) == 1 and b"gone.png" in errors[0]


@pytest.mark.slow
def test_make_chat_knows_both_toys_and_any_directory():
    def command(*words: str) -> str:
        done = subprocess.run(
            ["make", "--no-print-directory", "-n", "chat", *words],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.stdout.splitlines()[-1]

    assert command().endswith("talk.chat --model runs/toy/final")
    assert command("MODEL=moe").endswith("talk.chat --model runs/toy-moe/final")
    assert command("MODEL=/a/b").endswith("talk.chat --model /a/b")
