"""Command lines: an option is a field of a dataclass, its comment its help, an unknown one an error.

What it teaches: `tyro` makes a parser of a dataclass, so what a script can be told stands in one
place, typed and with its default. Three habits are added here, the same for every script:

    a switch is turned on by `--think` or `--think true`, and off by `--think false`
    numbers by name are words: `--mixture caption=2 ocr=0.5`
    what a user did wrong (ValueError, OSError) is one line and exit status 1, without a traceback;
    with NANOSAIL_TRACEBACK=1 the traceback comes too

    @dataclass
    class EvaluateOptions: ...

    if __name__ == "__main__":
        command(evaluate_files)        # def evaluate_files(options: EvaluateOptions) -> int | None
"""

import os
import sys
import traceback
from contextlib import contextmanager
from typing import Any, Callable, Iterator, NoReturn, get_type_hints

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from infra.text import Terminal, printable
from scale import parallel

YES = ("true", "yes", "on", "1")
NO = ("false", "no", "off", "0")


def read_switch(words: list[str]) -> bool:
    """The words after a switch: none is yes. Raises ValueError for anything but a yes or a no."""
    word = words[0].lower() if words else YES[0]
    if word not in YES + NO:
        raise ValueError(f"{words[0]!r} is neither true nor false")
    return word in YES


SWITCH = PrimitiveConstructorSpec(
    nargs=(0, 1),
    metavar="[true|false]",
    instance_from_str=read_switch,
    is_instance=lambda value: isinstance(value, bool),
    str_from_instance=lambda value: [str(value).lower()],
)


def read_shares(words: list[str]) -> dict[str, float]:
    """`caption=2 ocr=0.5` -> {"caption": 2.0, "ocr": 0.5}. Raises ValueError for anything else."""
    shares = {}
    for word in words:
        name, sign, number = word.rpartition("=")
        if not sign or not name:
            raise ValueError(f"{word!r} is not of the form NAME=NUMBER")
        shares[name] = float(number)
    return shares


SHARES = PrimitiveConstructorSpec(
    nargs="*",
    metavar="[NAME=NUMBER ...]",
    instance_from_str=read_shares,
    is_instance=lambda value: isinstance(value, dict),
    str_from_instance=lambda value: [f"{name}={number:g}" for name, number in value.items()],
)
REGISTRY = tyro.constructors.ConstructorRegistry()


@REGISTRY.primitive_rule
def own_rule(info: Any) -> PrimitiveConstructorSpec | None:
    """Tells tyro how to read a switch, and shares by name."""
    if info.type is bool:
        return SWITCH
    if info.type == dict[str, float]:
        return SHARES
    return None


def parse_options(options: Any, argv: list[str] | None = None, **how: Any) -> Any:
    """An instance of `options` (a dataclass, or an Annotated one) from the command line.

    Leaves with a message and status 2 for an option that is unknown or cannot be read.
    """
    with REGISTRY:
        return tyro.cli(options, args=argv, config=(tyro.conf.FlagConversionOff,), **how)


def parse_subcommand(choices: dict[str, tuple[str, Any]], argv: list[str] | None = None) -> Any:
    """The first word picks one of the `choices` (name -> its help, its defaults), the rest override it."""
    with REGISTRY:
        return tyro.extras.overridable_config_cli(
            choices, args=argv, config=(tyro.conf.FlagConversionOff,)
        )


@contextmanager
def one_line_errors() -> Iterator[None]:
    """What a user did wrong inside of it becomes one line on stderr and exit status 1."""
    try:
        yield
    except (ValueError, OSError) as error:
        if os.environ.get("NANOSAIL_TRACEBACK"):
            traceback.print_exc()
        line = f"error: {printable(error, lines=True)}"
        parallel.report_failure(error)
        print(line, file=Terminal(sys.stderr), flush=True)
        sys.exit(1)


def command(function: Callable, argv: list[str] | None = None) -> NoReturn:
    """The last line of a script: read the options that `function` takes, run it, and leave with the
    other ranks."""
    hints = get_type_hints(function, include_extras=True)
    hints.pop("return", None)
    (options_class,) = hints.values()
    options = parse_options(options_class, argv)
    with one_line_errors():
        status = function(options)
        parallel.stop()
    sys.exit(status or 0)
