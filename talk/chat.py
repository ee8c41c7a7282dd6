"""Talk to a model: one load, many turns, with pictures and videos.

What it teaches: a conversation is a list of messages that grows, and every turn asks about all of it, in the
form that training has (`Encoder.prompt`). What the model says while it thinks is not an answer: it is shown
dimmed, on one line, and is folded away when the answer begins; what it thought is left out of what it reads
in the next turn (our choice: training never shows earlier chains).

    a line -+- /command ----------------> does it
            +- pictures, no words ------> wait for the next question
            +- words (and pictures) ----> prompt of the whole talk -> stream -> thought | answer

    python -m talk.chat --model runs/toy/final           # or: make chat MODEL=dir
    echo "runs/pictures/dots-1.png how many things are there?" | python -m talk.chat

Answers go to stdout. In a terminal so does everything else; in a pipe the rest goes to stderr, and the exit
status is 1 when a line could not be used. Without colours or cursor (TERM=dumb, NO_COLOR, a pipe) nothing
but text is written. Text from the model, from files and from the keyboard is printed by `infra.text`.

Simplified: every turn reads the whole talk again; keys and values are not kept between turns.
"""

import itertools
import os
import shutil
import sys
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Literal

import torch

from data.encode import Encoder
from data.sample import MAX_FRAMES, Message, Sample
from generate import load_model, stream, user_turn
from infra.cli import command
from infra.device import torch_type
from infra.text import printable
from talk.interrupts import Interrupts
from talk.page import check_page_path, inside_lines, view_of, write_view
from talk.typed import listed_paths, read_picture, split_command, split_pictures, told
from tokenizer import Tokenizer
from vlm import SailVL

# `input` edits lines and remembers them once it is imported; Windows has none, and does so by itself
try:
    import readline
except ImportError:
    readline = None

DIM = "\033[2m"
PLAIN = "\033[0m"
AGAIN = "\r\033[2K"  # back to the start of the line, and the line empty

HELP = """\
Type a question. A picture is its path, anywhere in the line: pasted, dragged, in quotes, several of them.
A folder of pictures or a GIF is a video. A path alone waits for the next question.
  /think on|off   ask for a chain of thought before the answer, or not
  /image PATHS    pictures for the next question; without paths: which ones there are; /image none: drop them
  /show [FILE]    what each token of the last answer looked at, as a page (.html) or a picture (.png)
  /history        everything that was said, thoughts too
  /reset          forget everything
  /help           this
  /quit           leave; so does Ctrl-D. Ctrl-C ends an answer
python -m talk.samples draws pictures to ask the toy about."""


@dataclass
class ChatOptions:
    """Talk to a model about pictures."""

    # a model, or the directory of a run: its newest checkpoint
    model: Path = Path("runs/toy/final")
    think: bool = False  # ask for a chain of thought from the start
    show: Path = Path("runs/inside.html")  # where /show writes unless it is told
    frames: int = MAX_FRAMES  # of a video at most, evenly spaced
    max_new: int = 512  # tokens of an answer, thoughts included
    context: int = 16384  # tokens of the talk; the oldest turns are forgotten when it grows longer
    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    seed: int = 0
    device: str = "cpu"  # cuda, npu, mps
    dtype: Literal["float32", "bfloat16"] = "float32"


# --------------------------------------------------------------------------------------------- the screen


class Screen:
    """Where answers and remarks go.

    tty: a person reads it. interactive: a person types. styled: it understands dimming and moving the
    cursor.
    """

    def __init__(self) -> None:
        self.tty = sys.stdout.isatty()
        self.interactive = sys.stdin.isatty()
        # Windows' own terminal sets no TERM
        able = os.environ.get("TERM", "") not in ("", "dumb") or "WT_SESSION" in os.environ
        self.styled = self.tty and able and "NO_COLOR" not in os.environ
        self.failed = False
        self.thinking = False

        # bytes that are no text must not end the talk
        for file, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace")):
            if hasattr(file, "reconfigure"):
                file.reconfigure(errors=errors)

    def say(self, text: str) -> None:
        """A piece of an answer."""
        print(printable(text, lines=True), end="", flush=True)

    def remark(self, text: str) -> None:
        """A line that is no answer."""
        shown = printable(text, lines=True)
        if self.styled:
            shown = f"{DIM}{shown}{PLAIN}"
        print(shown, file=sys.stdout if self.tty else sys.stderr, flush=True)

    def complain(self, error: object) -> None:
        """A line about something that could not be done."""
        self.failed = True
        line = f"error: {printable(error)}"
        print(line, file=sys.stdout if self.tty else sys.stderr, flush=True)

    def think(self, so_far: str) -> None:
        """What is being thought: the end of it, over what this line said before."""
        if self.styled:
            width = shutil.get_terminal_size().columns - 4
            tail = tail_of(printable(so_far), width)
            print(f"{AGAIN}{DIM}... {tail}{PLAIN}", end="", flush=True)
        elif not self.thinking:
            self.remark("(thinking)")
        self.thinking = True

    def fold(self, tokens: int) -> None:
        """The thought is over: one line is left of it. Nothing when there was none."""
        if not self.thinking:
            return
        self.thinking = False
        if self.styled:
            print(AGAIN, end="")
        self.remark(f"(thought for {tokens} tokens; /history shows them)")

    def read(self) -> str | None:
        """The next line, None at the end. Raises KeyboardInterrupt for Ctrl-C."""
        if self.interactive and self.tty:
            try:
                return input("> ")
            except EOFError:
                print()
                return None
        line = sys.stdin.readline()
        return line.rstrip("\n") if line else None


def tail_of(text: str, width: int) -> str:
    """The end of a text that takes up at most so many columns; some letters take two."""
    used = 0
    for at in range(len(text) - 1, -1, -1):
        used += 2 if unicodedata.east_asian_width(text[at]) in "WF" else 1
        if used > width:
            return text[at + 1 :]
    return text


# ----------------------------------------------------------------------------------------------- the talk


@dataclass
class Exchange:
    """A question and its answer. sample: the talk up to the question; ids: all tokens that were chosen."""

    sample: Sample
    words: str
    pictures: list[Any]
    ids: list[int] = field(default_factory=list)
    thought: str = ""
    answer: str = ""

    @property
    def messages(self) -> tuple[Message, Message]:
        """As the next turn reads it."""
        return self.sample.messages[-1], Message("assistant", (self.answer,))


def labelled(ids: Iterable[int], tokenizer: Tokenizer) -> Iterator[tuple[bool, int]]:
    """Tokens of an answer, and whether each is part of a thought; tags and end tokens are left out."""
    thinking = False
    for token in ids:
        if token == tokenizer.think:
            thinking = True
        elif token == tokenizer.unthink:
            thinking = False
        elif token not in tokenizer.ends:
            yield thinking, token


class Talk:
    """A model, and what was said so far. waiting: pictures for the next question."""

    def __init__(self, model: SailVL, tokenizer: Tokenizer, options: ChatOptions):
        self.model = model
        self.encoder = Encoder(tokenizer, model.config)
        self.options = options
        self.think = options.think
        self.exchanges: list[Exchange] = []
        self.waiting: list[Any] = []

    def ask(self, words: str, pictures: list[Any], remark: Callable[[str], None]) -> Exchange:
        """Add a question, not answered yet. Forgets the oldest turns of a talk that is too long, and says
        so. Raises ValueError for a question that alone is too long.
        """
        asked = f"{words} {self.encoder.tokenizer.think_prompt}" if self.think else words
        question = user_turn(pictures, asked)

        # turns are forgotten from the oldest on, until the rest fits
        while True:
            before = [m for exchange in self.exchanges for m in exchange.messages]
            sample = Sample((*before, question), origin="the question")
            ids, _ = self.encoder.prompt(sample, reply=True)
            if len(ids) + self.options.max_new <= self.options.context:
                break
            if not self.exchanges:
                raise ValueError(
                    f"the question has {len(ids)} tokens, and its answer up to {self.options.max_new}: "
                    f"more than --context {self.options.context}"
                )
            del self.exchanges[0]
            remark("(the oldest turn is forgotten: the talk is longer than --context)")
        self.exchanges.append(Exchange(sample, words, pictures))
        return self.exchanges[-1]

    def answer(self, exchange: Exchange) -> Iterator[tuple[bool, str]]:
        """Pieces of the answer as they come, and whether each is a thought; all is kept in the exchange."""
        tokenizer = self.encoder.tokenizer
        options = self.options

        # another draw for each turn, where answers are drawn
        steps = stream(
            self.model,
            [self.encoder.prompt(exchange.sample, reply=True)],
            tokenizer.ends,
            max_new=options.max_new,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            seed=options.seed + len(self.exchanges),
        )

        # runs of thought and of answer, each decoded by itself: no character spans both
        tokens = self.kept(steps, exchange)
        for thinking, run in itertools.groupby(labelled(tokens, tokenizer), key=is_thought):
            for piece in tokenizer.stream(token for _, token in run):
                if thinking:
                    exchange.thought += piece
                else:
                    exchange.answer += piece
                yield thinking, piece

    def kept(self, steps: Iterable, exchange: Exchange) -> Iterator[int]:
        """The tokens of a stream, each written down when it comes."""
        for _, picked, _ in steps:
            exchange.ids.append(int(picked))
            yield exchange.ids[-1]

    def drop_unanswered(self) -> None:
        """A question without a token of an answer was no turn."""
        self.exchanges = [exchange for exchange in self.exchanges if exchange.ids]

    def reset(self) -> None:
        self.exchanges.clear()
        self.waiting.clear()


def is_thought(pair: tuple[bool, int]) -> bool:
    return pair[0]


# ----------------------------------------------------------------------------------------------- commands


def do_think(talk: Talk, screen: Screen, rest: str) -> None:
    if rest not in ("", "on", "off"):
        raise ValueError(f"/think {rest}: on or off")
    if rest:
        talk.think = rest == "on"
    screen.remark(f"thinking is {'on' if talk.think else 'off'}")


def do_image(talk: Talk, screen: Screen, rest: str) -> None:
    if rest == "none":
        talk.waiting.clear()
        screen.remark("no picture waits")
    elif rest:
        attach(talk, screen, listed_paths(rest))
    else:
        list_pictures(talk, screen)


def list_pictures(talk: Talk, screen: Screen) -> None:
    """Those of the talk, then those that wait."""
    for number, exchange in enumerate(talk.exchanges, 1):
        for picture in exchange.pictures:
            screen.remark(f"turn {number}: {told(picture)}")
    for picture in talk.waiting:
        screen.remark(f"waits: {told(picture)}")
    if not talk.waiting and not any(exchange.pictures for exchange in talk.exchanges):
        screen.remark("no picture yet")


def attach(talk: Talk, screen: Screen, paths: list[Path]) -> None:
    """Pictures for the next question: all of them, or none when one is bad."""
    pictures = [read_picture(path, talk.options.frames) for path in paths]
    for path, picture in zip(paths, pictures):
        screen.remark(f"{path}: {told(picture)}, waits for a question")
    talk.waiting += pictures


def do_show(talk: Talk, screen: Screen, rest: str) -> None:
    answered = [exchange for exchange in talk.exchanges if exchange.ids]
    if not answered:
        raise ValueError("/show: nothing was answered yet")
    path = Path(os.path.expanduser(rest)) if rest else talk.options.show
    check_page_path(path)
    last = answered[-1]

    # a page for later, and lines for now
    view = view_of(talk.model, talk.encoder, last.sample, last.ids, reply=True)
    write_view(path, view, last.words)
    for line in inside_lines(view):
        screen.remark(line)
    screen.remark(f"where it looked: {path}")


def do_history(talk: Talk, screen: Screen, rest: str) -> None:
    for exchange in talk.exchanges:
        pictures = "".join(f"[{told(picture)}] " for picture in exchange.pictures)
        screen.remark(f"you: {pictures}{exchange.words}")
        if exchange.thought:
            screen.remark(f"thought: {exchange.thought.strip()}")
        screen.say(f"{exchange.answer.strip()}\n")
    if not talk.exchanges:
        screen.remark("nothing was said yet")


def do_reset(talk: Talk, screen: Screen, rest: str) -> None:
    talk.reset()
    screen.remark("everything is forgotten")


def do_help(talk: Talk, screen: Screen, rest: str) -> None:
    screen.remark(HELP)


COMMANDS = {
    "think": do_think,
    "image": do_image,
    "show": do_show,
    "history": do_history,
    "reset": do_reset,
    "help": do_help,
}
LEAVE = ("quit", "exit")


# --------------------------------------------------------------------------------------------- the loop


def take_line(talk: Talk, screen: Screen, line: str) -> None:
    """One line of a person: a command, pictures, or a question. Raises ValueError and OSError."""
    name, rest = split_command(line)
    if name:
        if name not in COMMANDS:
            raise ValueError(f"/{name}: no such command; /help lists them")
        COMMANDS[name](talk, screen, rest)
        return

    # only pictures: they wait
    paths, words = split_pictures(line)
    if not words:
        attach(talk, screen, paths)
        return

    # a question; the pictures that waited are used up by one that can be asked
    named = [read_picture(path, talk.options.frames) for path in paths]
    text = words.encode("utf-8", "replace").decode()
    try:
        exchange = talk.ask(text, talk.waiting + named, screen.remark)
        talk.waiting.clear()
        print_answer(talk, screen, exchange)
    finally:
        talk.drop_unanswered()


def print_answer(talk: Talk, screen: Screen, exchange: Exchange) -> None:
    """Stream an answer: its thought on a line that is folded away, its words as they come.

    Ctrl-C ends it; what was said until then stays in the talk.
    """
    ending = ""
    try:
        for thinking, piece in talk.answer(exchange):
            if thinking:
                screen.think(exchange.thought)
            else:
                screen.fold(thought_tokens(talk, exchange))
                screen.say(piece)
        ending = how_it_ended(talk, exchange)
    except KeyboardInterrupt:
        if not screen.interactive:
            raise
        ending = "(ended)"
    screen.fold(thought_tokens(talk, exchange))
    screen.say("\n")
    if ending:
        screen.remark(ending)


def how_it_ended(talk: Talk, exchange: Exchange) -> str:
    """What a person should know of an answer's end; nothing of one that ended by itself."""
    if exchange.ids[-1] not in talk.encoder.tokenizer.ends:
        return f"(cut off after {len(exchange.ids)} tokens: --max-new)"
    return "" if exchange.answer.strip() else "(it said nothing)"


def thought_tokens(talk: Talk, exchange: Exchange) -> int:
    pairs = labelled(exchange.ids, talk.encoder.tokenizer)
    return sum(map(is_thought, pairs))


def chat(options: ChatOptions) -> int:
    """Read lines until there are no more. Nothing that a line does wrong ends the talk.

    Raises ValueError for an option that leaves nothing to say or to see.
    """
    for name in ("max_new", "frames"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1")

    # one load
    screen = Screen()
    model, tokenizer = load_model(options.model, options.device, torch_type(options.dtype))
    talk = Talk(model, tokenizer, options)
    millions = model.parameter_counts()["total"] / 1e6
    if screen.tty:
        screen.remark(
            f"{options.model}: {millions:.1f} M parameters on {options.device}. /help helps."
        )

    # many turns
    if screen.interactive:
        talk_to_person(talk, screen)
        return 0
    return read_pipe(talk, screen)


def talk_to_person(talk: Talk, screen: Screen) -> None:
    """Line after line. Ctrl-C ends what is being done."""
    going = True
    with Interrupts() as interrupts:
        while going:
            try:
                with interrupts.expected():
                    going = take_turn(talk, screen)
            except KeyboardInterrupt:
                screen.remark("\n(Ctrl-D or /quit leaves)")


def read_pipe(talk: Talk, screen: Screen) -> int:
    """The same without anybody there, and the exit status. Ctrl-C ends it."""
    going = True
    try:
        while going:
            going = take_turn(talk, screen)
    except KeyboardInterrupt:
        return 130
    return int(screen.failed)


def take_turn(talk: Talk, screen: Screen) -> bool:
    """One line, read and done. False when there are no more, or it was the last."""
    line = screen.read()
    if line is None or line.strip() in [f"/{word}" for word in LEAVE]:
        return False
    if line.strip():
        try_line(talk, screen, line)
    return True


def try_line(talk: Talk, screen: Screen, line: str) -> None:
    """`take_line`, whose errors become one line."""
    try:
        take_line(talk, screen, line)
    except (ValueError, OSError) as error:
        screen.complain(error)
    except torch.OutOfMemoryError:
        screen.complain("not enough memory for this talk: /reset, or ask about fewer pictures")


if __name__ == "__main__":
    command(chat)
