"""Mutants: does the quick suite notice when one thing in a file is wrong?

What it teaches: a test that cannot fail protects nothing, and a suite is measured by what it lets pass.
A mutant is the project with a single change in one file: `<` becomes `<=`, `+` becomes `-`, 0.2 becomes
0.4, a statement is gone, a condition is turned round. Tests that still pass say that nobody would notice.

    python -m tests.campaign.mutants --file rewards.py --count 22 --seed 1
    python -m tests.campaign.mutants --file rewards.py    # again: those that lived, if tests changed

    file ── sites ── sample ── one mutant at a time, in a copy of the tree ── killed | survived
                                    └─ only the quick tests that run through its line, fastest first

To be quick, PyTorch is imported once and every mutant is a fork. Which tests run through which line is
found by tracing them once; a line that no test runs through has all of the file's tests.

Not mutated: docstrings, messages, annotations, assertions, decorators. EQUIVALENT names the mutants that
no test can kill, with the reason.
"""

import ast
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pytest
import tyro

from tests.campaign.ledger import FOLDER, ROOT, Ledger, Row, code_of

# Which quick tests speak for a file. rl.py is a table; what it was is rollout.py, and both are sampled.
TESTS = {
    "rewards.py": ("rewards", "endpoint", "rl"),
    "policy_losses.py": ("policy_losses", "rl"),
    "data/stream.py": ("stream", "readers"),
    "adalrs.py": ("adalrs",),
    "packing.py": ("packing",),
    "data/steps.py": ("packing", "feeding"),
    "moe.py": ("moe", "spine", "model", "rl"),
    "infra/checkpoint.py": ("checkpoint", "stopping", "ranks"),
    "infra/run_directory.py": ("checkpoint", "stopping", "ranks"),
    "infra/keeper.py": ("checkpoint", "stopping", "ranks"),
    "train.py": ("train", "spine", "stopping"),
    "rollout.py": ("rl", "endpoint"),
    "rl.py": ("sft", "recipe", "readme"),
}
# These count as one of the nine files: what was one, or belongs together.
SHARED_COUNT = {
    "rl.py": 4,
    "rollout.py": 18,
    "packing.py": 11,
    "data/steps.py": 11,
    "infra/checkpoint.py": 8,
    "infra/run_directory.py": 7,
    "infra/keeper.py": 7,
}
COUNT = 22
SLOWEST = 900.0  # seconds for one mutant, at the most,
MOST = 120  # and of processor time: a loop without end
NOTHING_RUN = (4, 5)  # statuses of pytest: wrong usage, no tests
MEMORY = 8 << 30  # bytes of address space of one mutant

# Mutants that change nothing that could be seen: (file, text of the line, what became of it) -> why.
MATRIX = "a matrix: its second dimension is its last"
EQUIVALENT: dict[tuple[str, str, str], str] = {
    ("infra/keeper.py", "self.saved = False  # whether the last one was written", "True"): (
        "whoever reads it has saved before"
    ),
    ("rollout.py", "batches.append(self.pack(minibatch[:1], empty=True))", "2"): (
        "at weight zero one completion is as good as two"
    ),
    ("data/steps.py", "fewer = [n for n in fitting if n < ranks][-1:]", "(n <= ranks)"): (
        "the number of ranks is none of those that fit, or there were no error"
    ),
    (
        "adalrs.py",
        "clear = faster > ERRORS * error or (faster > 0 and straight)",
        "(faster >= ERRORS * error)",
    ): "no gain matters where it equals its error to the last bit",
    ("data/stream.py", "self.generation += 1", "2"): "generations are only told apart",
    ("moe.py", "own = routing.logits.topk(k, dim=-1).indices", "(+1)"): MATRIX,
    ("moe.py", "weights = probabilities.gather(-1, chosen)", "(+1)"): MATRIX,
    ("moe.py", "chosen = scores.topk(k, dim=-1).indices", "(+1)"): MATRIX,
    ("moe.py", "gate, up = z.chunk(2, dim=-1)", "(+1)"): MATRIX,
    ("moe.py", "d_z = torch.cat([d_gate, d_up], dim=-1)  # (S*K, 2I)", "(+1)"): MATRIX,
    (
        "moe.py",
        "share = load / load.sum(-1, keepdim=True).clamp_min(1e-9)",
        "2e-09",
    ): "it only keeps zero from being divided by zero",
    ("infra/checkpoint.py", "time.sleep(0.02)", "0.04"): "how often it looks, not what it finds",
    ("moe.py", "order = expert.argsort(stable=True)", "False"): "any order within an expert is one",
}


# ------------------------------------------------------------------------------------- what may change


@dataclass(frozen=True)
class Mutant:
    """One change: characters start to end of the file become `after`."""

    file: str
    line: int
    kind: str
    start: int
    end: int
    before: str
    after: str

    @property
    def name(self) -> str:
        return f"{self.file}:{self.line} {self.kind} {self.start}-{self.end} {self.after!r}"


COMPARISONS = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
OPERATORS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
SPEAKING = {"print", "announce", "warn", "warning", "info", "error", "_say", "debug"}


class Sites(ast.NodeVisitor):
    """Every place of a source where something can be wrong, and what it would become."""

    def __init__(self, file: str, source: str):
        self.file = file
        self.source = source
        lines = source.encode().splitlines(keepends=True)
        self.begins = [sum(map(len, lines[:n])) for n in range(len(lines) + 1)]
        self.found: list[Mutant] = []
        self.visit(ast.parse(source))

    def add(self, node: ast.AST, kind: str, after: str) -> None:
        raw = self.source.encode()
        start = self.begins[node.lineno - 1] + node.col_offset
        end = self.begins[node.end_lineno - 1] + node.end_col_offset
        before = raw[start:end].decode()
        if "\n" not in before or kind in ("branch", "deleted"):
            self.found.append(Mutant(self.file, node.lineno, kind, start, end, before, after))

    # what is not looked into: words, types, invariants

    def visit_JoinedStr(self, node) -> None:
        return

    visit_Assert = visit_Import = visit_ImportFrom = visit_JoinedStr

    def visit_Raise(self, node) -> None:
        self.add(node, "deleted", "pass")

    def visit_AnnAssign(self, node) -> None:
        if node.value:
            self.visit(node.value)

    def visit_arguments(self, node) -> None:
        for default in [*node.defaults, *filter(None, node.kw_defaults)]:
            self.visit(default)

    def visit_FunctionDef(self, node) -> None:
        self.visit(node.args)
        for statement in node.body:
            self.visit(statement)

    def visit_ClassDef(self, node) -> None:
        for statement in node.body:
            self.visit(statement)

    # statements

    def visit_Expr(self, node) -> None:
        if not isinstance(node.value, ast.Call):
            return
        function = node.value.func
        if getattr(function, "id", getattr(function, "attr", "")) in SPEAKING:
            return
        self.add(node, "deleted", "pass")
        self.visit(node.value)

    def visit_Assign(self, node) -> None:
        if isinstance(node.targets[0], (ast.Attribute, ast.Subscript)):
            self.add(node, "deleted", "pass")
        self.visit(node.value)

    def visit_AugAssign(self, node) -> None:
        self.add(node, "deleted", "pass")
        if type(node.op) in OPERATORS:
            other = ast.AugAssign(node.target, OPERATORS[type(node.op)](), node.value)
            self.add(node, "arithmetic", ast.unparse(other))
        self.visit(node.value)

    def visit_Break(self, node) -> None:
        self.add(node, "deleted", "pass")

    visit_Continue = visit_Break

    def visit_If(self, node) -> None:
        if "__main__" in ast.unparse(node.test):
            return
        self.add(node.test, "branch", f"(not ({ast.unparse(node.test)}))")
        self.generic_visit(node)

    visit_IfExp = visit_If

    # expressions

    def visit_Compare(self, node) -> None:
        for other in COMPARISONS[type(node.ops[0])]:
            changed = ast.Compare(node.left, [other(), *node.ops[1:]], node.comparators)
            self.add(node, "comparison", f"({ast.unparse(changed)})")
        self.generic_visit(node)

    def visit_BinOp(self, node) -> None:
        text = (ast.JoinedStr, ast.List, ast.Tuple, ast.ListComp)
        words = [isinstance(side, text) or is_word(side) for side in (node.left, node.right)]
        if type(node.op) in OPERATORS and not any(words):
            changed = ast.BinOp(node.left, OPERATORS[type(node.op)](), node.right)
            self.add(node, "arithmetic", f"({ast.unparse(changed)})")
        self.generic_visit(node)

    def visit_BoolOp(self, node) -> None:
        other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        self.add(node, "boolean", f"({ast.unparse(ast.BoolOp(other, node.values))})")
        self.generic_visit(node)

    def visit_UnaryOp(self, node) -> None:
        if isinstance(node.op, ast.Not):
            self.add(node, "boolean", f"bool({ast.unparse(node.operand)})")
        if isinstance(node.op, ast.USub):
            self.add(node, "arithmetic", f"(+{ast.unparse(node.operand)})")
        self.generic_visit(node)

    def visit_Constant(self, node) -> None:
        value = node.value
        if isinstance(value, bool):
            self.add(node, "constant", str(not value))
        elif isinstance(value, int):
            self.add(node, "constant", str(value + 1))
        elif isinstance(value, float):
            self.add(node, "constant", repr(value * 2 if value else 1.0))


def is_word(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, (str, bytes))


def sites(file: str) -> list[Mutant]:
    """All mutants of a file, in the order of its lines."""
    return Sites(file, (ROOT / file).read_text()).found


def sample(file: str, count: int, seed: int) -> list[Mutant]:
    """So many of them, no two at one place."""
    everything = sites(file)
    random.Random(f"{file} {seed}").shuffle(everything)
    chosen: dict[tuple[int, int], Mutant] = {}
    for mutant in everything:
        chosen.setdefault((mutant.start, mutant.end), mutant)
    return list(chosen.values())[:count]


def reason(mutant: Mutant) -> str:
    """Why this mutant is none, if it is listed as one."""
    line = (ROOT / mutant.file).read_text().splitlines()[mutant.line - 1].strip()
    return EQUIVALENT.get((mutant.file, line, mutant.after), "")


# ------------------------------------------------------------------------------- tests, in a copy


def copy_tree(folder: Path) -> Path:
    """The project without its runs, for one mutant at a time."""
    place = folder / "tree"
    shutil.rmtree(place, ignore_errors=True)
    ignored = shutil.ignore_patterns(".git", ".venv", "runs", "real", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, place, ignore=ignored, symlinks=True)
    shared = ROOT.parent / "shared"
    if shared.is_dir() and not (folder / "shared").exists():
        (folder / "shared").symlink_to(shared)
    return place


class Forked:
    """A process of its own group that runs pytest in the copy, and what became of it."""

    def __init__(self, place: Path, words: list[str], output: Path, plugin, seconds: int = 3600):
        self.output = output
        self.began = time.monotonic()
        self.process = os.fork()
        if self.process == 0:
            os.setsid()
            os._exit(self.work(place, words, plugin, seconds))

    def work(self, place: Path, words: list[str], plugin, seconds: int) -> int:
        said = os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(said, 1)
        os.dup2(said, 2)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        os.chdir(place)
        sys.dont_write_bytecode = True
        here = {str(ROOT), "", "."}
        sys.path[:] = [str(place)] + [entry for entry in sys.path if entry not in here]
        for name in [name for name in sys.modules if name == "tests" or name.startswith("tests.")]:
            del sys.modules[name]

        with tempfile.TemporaryDirectory() as base:
            options = ["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", "-p", "no:xdist"]
            options += ["--basetemp", f"{base}/t", "--tb=line", "-W", "ignore"]
            status = pytest.main([*options, *words], plugins=[plugin])
            plugin.save()
        sys.stdout.flush()
        return int(status)

    def wait(self, seconds: float) -> int | None:
        """Its exit status; None when it had to be ended. Whatever it started ends with it."""
        status = None
        while status is None and time.monotonic() - self.began < seconds:
            done, raw = os.waitpid(self.process, os.WNOHANG)
            if done:
                status = os.waitstatus_to_exitcode(raw)
            else:
                time.sleep(0.02)
        try:
            os.killpg(self.process, signal.SIGKILL)
        except ProcessLookupError:
            return status  # nobody is left
        if status is None:
            os.waitpid(self.process, 0)
        return status


@dataclass
class Chosen:
    """Runs some tests in this order and no other (a pytest plugin: an id may hold anything)."""

    names: list[str]

    def pytest_collection_modifyitems(self, items):
        place = {name: n for n, name in enumerate(self.names)}
        items[:] = sorted(
            (item for item in items if item.nodeid in place), key=lambda item: place[item.nodeid]
        )

    def save(self) -> None:
        return


@dataclass(eq=False)
class Tracer:
    """Notes which tests run through which lines of one file, and how long each takes (a pytest plugin)."""

    file: str
    notes: Path
    lines: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    seconds: dict[str, float] = field(default_factory=dict)
    forks: set[str] = field(default_factory=set)
    now: str = "import"
    fixtures: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))

    def __post_init__(self):
        os.register_at_fork(before=lambda: self.forks.add(self.now))

    def trace(self, frame, event, _):
        if not frame.f_code.co_filename.endswith(f"/{self.file}"):
            return None
        self.lines[self.now].add(frame.f_lineno)
        return self.trace

    def watch(self, name: str):
        before = self.now
        self.now = name
        sys.settrace(self.trace)
        return before

    def pytest_collection(self, session):
        self.watch("import")

    def pytest_runtest_protocol(self, item, nextitem):
        self.watch(item.nodeid)
        self.fixtures[item.nodeid] = {f"fixture {name}" for name in item.fixturenames}
        self.began = time.perf_counter()

    def pytest_runtest_logfinish(self, nodeid, location):
        self.seconds[nodeid] = time.perf_counter() - self.began

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef, request):
        # what several tests share is worked through once: its lines are lines of all of them
        shared = fixturedef.scope != "function"
        before = self.watch(f"fixture {fixturedef.argname}" if shared else self.now)
        try:
            return (yield)
        finally:
            self.now = before

    def pytest_runtest_call(self, item):
        self.now = item.nodeid

    def save(self) -> None:
        sys.settrace(None)
        tests = {}
        for test, seconds in self.seconds.items():
            lines = set(self.lines[test])
            for fixture in self.fixtures[test]:
                lines |= self.lines.get(fixture, set())
            tests[test] = {"lines": sorted(lines), "seconds": seconds, "forks": test in self.forks}
        imports = sorted(self.lines["import"])
        self.notes.write_text(json.dumps({"tests": tests, "import": imports}))


def test_files(file: str) -> list[str]:
    return [f"tests/test_{name}.py" for name in TESTS[file]]


def traced(file: str, place: Path) -> dict:
    """Which tests run through which lines: traced once for the file's and its tests' present state."""
    names = [file, *test_files(file), "tests/conftest.py"]
    key = code_of(ROOT / name for name in names)
    notes = FOLDER / f"traced-{file.replace('/', '-')}-{key}.json"
    if not notes.is_file():
        output = FOLDER / f"traced-{file.replace(chr(47), chr(45))}.txt"
        status = Forked(place, test_files(file), output, Tracer(file, notes)).wait(1800)
        if status != 0:
            notes.unlink(missing_ok=True)
            raise ValueError(f"{file}: its tests fail before anything is changed, see {output}")
    return json.loads(notes.read_text())


def tests_for(mutant: Mutant, known: dict) -> list[str]:
    """The tests that run through a mutant's line, fastest first; then those that fork."""
    span = mutant.before.count("\n") + 1
    lines = set(range(mutant.line, mutant.line + span))
    tests = known["tests"]
    by_time = sorted(tests, key=lambda name: tests[name]["seconds"])
    through = [name for name in by_time if lines & set(tests[name]["lines"])]
    if not through or lines & set(known["import"]):
        return by_time
    return through + [name for name in by_time if tests[name]["forks"] and name not in through]


# --------------------------------------------------------------------------------------- one mutant


def try_mutant(mutant: Mutant, place: Path, known: dict) -> dict:
    """Run the tests on a mutant: {"seen": killed, survived or timeout, "by": the test, "seconds"}."""
    target = place / mutant.file
    whole = (ROOT / mutant.file).read_bytes()
    target.write_bytes(whole[: mutant.start] + mutant.after.encode() + whole[mutant.end :])
    tests = tests_for(mutant, known)
    expected = sum(known["tests"][name]["seconds"] for name in tests)
    output = place.parent / "mutant.txt"
    began = time.monotonic()
    files = sorted({name.partition("::")[0] for name in tests})
    seconds = int(min(MOST, 20 + 2 * expected))
    try:
        status = Forked(place, files, output, Chosen(tests), seconds).wait(SLOWEST)
    finally:
        target.write_bytes(whole)

    said = output.read_text(errors="replace")
    failed = re.findall(r"^(?:FAILED|ERROR) (tests/\S+)", said, re.MULTILINE)
    by = failed[-1] if failed else f"status {status}"
    broken = "ImportError while loading conftest" in said
    if status in NOTHING_RUN and not broken:
        raise ValueError(f"{mutant.name}: pytest ran nothing\n{said[-1000:]}")
    seen = "survived" if status == 0 else "killed"
    return {"seen": seen, "by": by, "seconds": round(time.monotonic() - began, 1)}


def tests_code(file: str) -> str:
    """Of the tests that speak for a file: a mutant that lived is tried again when they change."""
    return code_of(ROOT / name for name in test_files(file))


def run_file(file: str, mutants: list[Mutant], place: Path) -> None:
    """Try some mutants of a file, those that are not in the ledger yet."""
    ledger = Ledger("mutants", code_of([ROOT / file]))
    present = tests_code(file)
    todo = []
    for mutant in mutants:
        last = ledger.done.get(mutant.name, {"seen": "survived", "tests": ""})
        if last["seen"] == "survived" and last["tests"] != present:
            todo.append(mutant)
    if not todo:
        return
    known = traced(file, place)
    for mutant in todo:
        why = reason(mutant)
        found = {"seen": "equivalent", "by": why} if why else try_mutant(mutant, place, known)
        ledger.add(mutant.name, tests=present, **asdict(mutant), **found)
        print(
            f"{found['seen']:10s} {mutant.file}:{mutant.line} {mutant.kind}: "
            f"{mutant.before[:60]!r} -> {mutant.after[:60]!r}  {found['by']}",
            flush=True,
        )


# -------------------------------------------------------------------------------------------- command


@dataclass
class MutantOptions:
    """Mutants of some files, and whether the quick suite notices them."""

    file: tuple[str, ...] = tuple(TESTS)  # which files
    count: int = COUNT  # mutants of each
    seed: int = 1  # of the sample


def run(options: MutantOptions) -> None:
    """Try the mutants that are missing in the ledger, and those that lived before tests changed."""
    # what every test needs is imported here, once, and nothing of the project
    import numpy  # noqa: F401
    import PIL.Image  # noqa: F401
    import safetensors.torch  # noqa: F401
    import torch

    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        place = copy_tree(Path(folder))
        for file in options.file:
            count = SHARED_COUNT.get(file, options.count)
            run_file(file, sample(file, count, options.seed), place)


def rows(seed: int = 1, count: int = COUNT) -> list[Row]:
    """The table's lines: a file each."""
    table = []
    for file in TESTS:
        ledger = Ledger("mutants", code_of([ROOT / file]))
        names = {mutant.name for mutant in sample(file, SHARED_COUNT.get(file, count), seed)}
        tried = [row for name, row in ledger.done.items() if name in names]
        seen = Counter(row["seen"] for row in tried)
        died = seen["killed"] + seen["equivalent"]
        if tried:
            words = ", ".join(f"{n} {what}" for what, n in seen.most_common())
            held = died >= 0.9 * len(tried)
            table.append(Row(f"mutants of {file}", len(tried), "9 of 10 are noticed", words, held))
    return table


if __name__ == "__main__":
    run(tyro.cli(MutantOptions))
