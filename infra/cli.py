"""Command lines: an option is a field of a dataclass, its comment its help, an unknown one an error.

What it teaches: `tyro` makes a parser of a dataclass, so what a script can be told stands in one
place, typed and with its default. Two habits are added here, the same for every script:

    a switch is turned on by `--think` or `--think true`, and off by `--think false`
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
from typing import Any, Callable, NoReturn, get_type_hints

import tyro
from tyro.constructors import PrimitiveConstructorSpec

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
REGISTRY = tyro.constructors.ConstructorRegistry()


@REGISTRY.primitive_rule
def switch_rule(info: Any) -> PrimitiveConstructorSpec | None:
    """Tells tyro how to read a bool."""
    return SWITCH if info.type is bool else None


def parse_options(options: Any, argv: list[str] | None = None, **how: Any) -> Any:
    """An instance of `options` (a dataclass, or an Annotated one) from the command line.

    Leaves with a message and status 2 for an option that is unknown or cannot be read.
    """
    with REGISTRY:
        return tyro.cli(options, args=argv, config=(tyro.conf.FlagConversionOff,), **how)


def guarded(function: Callable, *arguments: Any) -> NoReturn:
    """Run it and leave with its status; a user's mistake becomes one line on stderr, status 1."""
    try:
        status = function(*arguments)
    except (ValueError, OSError) as error:
        if os.environ.get("NANOSAIL_TRACEBACK"):
            traceback.print_exc()
        parallel.report_failure(error)
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    sys.exit(status or 0)


def command(function: Callable, argv: list[str] | None = None) -> NoReturn:
    """The last line of a script: read the options that `function` takes, and run it."""
    hints = get_type_hints(function, include_extras=True)
    hints.pop("return", None)
    (options,) = hints.values()
    guarded(function, parse_options(options, argv))
