"""README.md, RESULTS.md and CONTRIBUTING.md: what they name exists, what they show is generated, what they
tell to type is understood.

The commands of "The released weights" are run by test_page.py; here every command of every page is parsed by
the script that it names.
"""

import ast
import json
import re
import runpy
import shlex
import sys

import pytest
import tyro
from conftest import ROOT

from curation.__main__ import CONTENTS
from tools import picture, readme

PAGES = ("README.md", "RESULTS.md", "CONTRIBUTING.md", "FAQ.md", "PAPER.md", "curation/README.md")


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------ blocks


def test_the_table_of_files_is_up_to_date():
    assert readme.file_table() in text_of("README.md"), "run `make readme`"


def test_the_tables_of_stages_and_machines_are_what_the_code_says():
    assert readme.stage_table() in text_of("README.md"), "run `make readme`"
    assert readme.rung_table() in text_of("README.md"), "run `make readme`"
    assert readme.memory_table() in text_of("RESULTS.md"), "run `make readme`"


def test_the_papers_tokens_are_met():
    import pretrain
    import sft

    for name, stage in (pretrain.PAPER | sft.PAPER).items():
        printed = re.fullmatch(r"([\d.]+)B", readme.PRINTED_TOKENS.get(name, ""))
        if printed:
            tokens = stage.steps * stage.rows * stage.length / 1e9
            assert tokens == pytest.approx(float(printed[1]), rel=0.03), name


def test_a_file_without_a_place_in_the_reading_order_is_an_error(monkeypatch):
    shorter = {title: names[1:] for title, names in readme.READING.items()}
    monkeypatch.setattr(readme, "READING", shorter)
    with pytest.raises(ValueError, match=r"\.py has no place in READING"):
        readme.file_table()


def test_a_block_is_kept_where_its_run_is_missing(tmp_path, monkeypatch):
    pages = {name: text_of(name) for name in readme.PAGES}
    for name, text in pages.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    monkeypatch.setitem(readme.PAGES, "README.md", lambda: {"files": None, "rungs": "| new |"})

    readme.rewrite_page("RESULTS.md")  # no run in this folder
    readme.rewrite_page("README.md")
    assert (tmp_path / "RESULTS.md").read_text(encoding="utf-8") == pages["RESULTS.md"]
    written = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "<!-- rungs -->\n| new |\n<!-- /rungs -->" in written
    start = pages["README.md"].index("<!-- rungs -->")
    assert written[:start] == pages["README.md"][:start]


def test_a_run_becomes_its_tables(tmp_path, monkeypatch):
    stage = {
        "name": "soup",
        "metric": "overall",
        "seconds": 12.4,
        "before": 0.25,
        "after": 0.5,
        "chance": 0.125,
        "samples": 8,
    }
    score = {"accuracy": 0.5, "error": 0.1, "chance": 0.2, "n": 8}
    results = {
        "stages": [stage],
        "final": {"charts": score, "overall": score},
        "swap": {"charts": {"swapped": 0.25}},
        "families_after": {"soup": {"overall": 0.5}},
        "parameters": {"total": 2e6, "active": 1e6},
        "adalrs": {
            "start_lr": 1e-4,
            "final_lr": 1e-3,
            "decisions": [1, 2],
            "extra_steps": 24,
            "loss": 0.8,
        },
        "modes": {
            "direct_thinks": 0.0,
            "direct_accuracy": 0.9,
            "think_thinks": 1.0,
            "think_accuracy": 0.8,
        },
        "total_seconds": 477.2,
        "cores": 2,
        "peak_memory_gib": 2.34,
        "versions": {"torch": "2.13"},
        "seed": 0,
        "packing": {"filled": 0.999},
    }
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    (tmp_path / "runs" / "toy").mkdir(parents=True)
    (tmp_path / "runs" / "toy" / "results.json").write_text(json.dumps(results))
    tables = readme.ladder_tables("toy")
    assert "| soup | 12 | overall | 0.250 | **0.500** | 0.125 | 8 |" in tables
    assert "| charts | **50.0%** | 10.0% | 20.0% | 25.0% | 8 |" in tables
    assert "477 seconds on 2 cores" in tables and "in 2 decisions" in tables

    (tmp_path / "table.md").write_text("| a | b | c |\n|---|---|---|\n| 1 | 2 | 3 |\n")
    assert readme.run_table("table.md", "c | a") == "| c | a |\n| --- | --- |\n| 3 | 1 |"


def test_the_drawing_of_the_ladder_is_that_of_its_numbers():
    ladder = json.loads((ROOT / "figures" / "ladder.json").read_text())
    assert (ROOT / "figures" / "ladder.svg").read_text() == picture.draw_ladder(ladder)


# ------------------------------------------------------------------------------- what is named


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", text_of(page)):
            if not target.startswith("https://"):
                assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"


def named_places() -> list[tuple[str, str]]:
    """(file, name) of every "`file.py`: `name`, `name`" in README.md, CONTRIBUTING.md and FAQ.md."""
    places = []
    for page in ("README.md", "CONTRIBUTING.md", "FAQ.md"):
        for path, names in re.findall(r"`([\w/]+\.py)`: ((?:`[\w.]+`(?:, )?)+)", text_of(page)):
            places += [(path, name) for name in re.findall(r"`([\w.]+)`", names)]
    return places


def defined_names(path: str) -> set[str]:
    """Functions, classes, methods as Class.method, and constants of a file."""
    names = set()
    for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign):
            names.add(node.target.id)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
            inner = [n for n in getattr(node, "body", []) if isinstance(n, ast.FunctionDef)]
            names |= {f"{node.name}.{method.name}" for method in inner}
    return names


def test_every_place_that_the_pages_name_is_there():
    places = named_places()
    assert len(places) > 20
    lost = [f"{path}: {name}" for path, name in places if name not in defined_names(path)]
    assert not lost


def test_how_to_extend_is_one_page_of_few_places():
    lines = text_of("CONTRIBUTING.md").splitlines()
    assert len(lines) <= 60
    sections = re.split(r"^### ", text_of("CONTRIBUTING.md"), flags=re.MULTILINE)[1:]
    assert len(sections) >= 6
    for section in sections:
        files = set(re.findall(r"^\d\. `([\w/]+\.py)`", section, re.MULTILINE))
        assert 1 <= len(files) <= 3, section


# ---------------------------------------------------------------------------------- commands


class Parsed(Exception):
    """The script has read its options; it goes no further."""


def commands() -> list[str]:
    """Every command in the pages' code blocks, and every one with options inside a line."""
    lines = []
    for page in PAGES:
        text = text_of(page)
        blocks = re.findall(r"^```(?:bash)?\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        lines += "\n".join(blocks).replace("\\\n", " ").splitlines()
        inside = re.findall(r"`((?:python|torchrun) [^`]+)`", text)
        lines += [line for line in inside if re.search(r"(\.py|-m [\w.]+) .*--", line)]
    typed = [line for line in lines if re.match(r"(python|torchrun|make) ", line)]
    words = [shlex.split(line.partition(" > ")[0], comments=True) for line in typed]
    return list(dict.fromkeys(map(shlex.join, words)))


def understood(words: list[str], monkeypatch) -> None:
    """Run a script up to where it has read its options. Raises SystemExit for those that it refuses."""
    real, choose = tyro.cli, tyro.extras.overridable_config_cli

    def cli(*arguments, **more):
        real(*arguments, **more)
        raise Parsed

    def cli_of_choices(*arguments, **more):
        choose(*arguments, **more)
        raise Parsed

    monkeypatch.setattr(tyro, "cli", cli)
    monkeypatch.setattr(tyro.extras, "overridable_config_cli", cli_of_choices)
    with pytest.raises(Parsed):
        if words[0] == "-m":
            monkeypatch.setattr(sys, "argv", words[1:])
            runpy.run_module(words[1], run_name="__main__")
        else:
            monkeypatch.setattr(sys, "argv", words)
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")


@pytest.mark.filterwarnings("ignore:.*found in sys.modules.*:RuntimeWarning")
@pytest.mark.parametrize("line", commands())
def test_every_command_is_understood_by_its_script(line, monkeypatch, capsys):
    words = shlex.split(line)
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[1] in targets
        return

    # What comes before the script: an interpreter, or torchrun and its own options.
    program = words.pop(0)
    while program == "torchrun" and words[0].startswith("--"):
        words = words[1:] if words[0] == "--standalone" else words[2:]
    assert program in ("python", "torchrun")
    understood(words, monkeypatch)


# ------------------------------------------------------------------------------ requirements


def pinned() -> dict[str, str]:
    """The lock's packages, by normal name."""
    lock = (ROOT / "requirements" / "lock.txt").read_text()
    names = re.findall(r"^([\w.-]+)==([\w.]+)", lock, re.MULTILINE)
    return {name.lower().replace("_", "-"): version for name, version in names}


def test_the_lock_has_every_package_that_the_suite_needs_with_hashes():
    lock = (ROOT / "requirements" / "lock.txt").read_text()
    entries = re.split(r"^(?=[\w.-]+==)", lock, flags=re.MULTILINE)[1:]
    assert all("--hash=sha256:" in entry for entry in entries)
    for name in ("core", "check", "test", "oracle"):
        for line in (ROOT / "requirements" / f"{name}.txt").read_text().splitlines():
            package = re.match(r"([\w.-]+)(?:==([\w.]+))?", line)
            if package and package[1] != "torch":
                locked = pinned().get(package[1].lower().replace("_", "-"))
                assert locked, f"{package[1]} is not in the lock: run `make lock`"
                assert package[2] in (None, locked)
    assert "torch" not in pinned()  # its wheels differ by device, not by version


def test_every_open_requirement_has_its_reason_and_no_place_of_a_machine_is_named():
    for path in (ROOT / "requirements").glob("*"):
        text = path.read_text()
        assert not re.search(r"file:|https?://|/home/|/opt/|/root/|--index|--find-links", text), (
            path
        )
    for name in ("core", "check", "data", "test", "bench", "real", "serve"):
        for line in (ROOT / "requirements" / f"{name}.txt").read_text().splitlines():
            assert "#" in line, f"{name}.txt: {line}"


def test_the_contents_of_curation_name_every_command_of_the_room():
    """Each entry's function stands in its file, and no file that is a command is left out."""
    places = [e.place.split(":") for chapter in CONTENTS.values() for e in chapter]
    for module, function in places:
        file = ROOT / (module.replace(".", "/") + ".py")
        assert f"\ndef {function}(" in file.read_text(encoding="utf-8"), f"{module}: {function}"
    commands_here = {
        f"curation.{file.stem}"
        for file in (ROOT / "curation").glob("[!_]*.py")
        if "__main__" in file.read_text(encoding="utf-8")
    }
    assert commands_here == {module for module, _ in places}


def test_the_page_of_a_real_language_model_is_made_of_its_run(tmp_path, monkeypatch):
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    assert readme.smol_tables() is None
    for name in ("eyes", "align", "answers"):
        run = tmp_path / "runs" / "smol" / name
        run.mkdir(parents=True)
        (run / "stage.json").write_text(json.dumps({"rows": 4, "length": 300}))
        (run / "log.jsonl").write_text('{"tokens_per_second": 10}\n' * 3)
    losses = {"seen": 1.0, "swapped": 3.0, "blind": 2.0, "bigram": 2.5, "margin": 1.0}
    text = {"before": 20.0, "after": 20.1, "change": 0.005}
    scores = {"kind": [0.5, 0.2, 0.05, 100]}
    results = {"captions": 200, "losses": losses, "scores": scores, "text": text}
    (run / "results.json").write_text(json.dumps(results))
    page = readme.smol_tables()
    assert "| 1.000 | 3.000 | 2.000 | 2.500 | 1.000 |" in page
    assert "| kind | **50.0%** | 5.0% | 20.0% | 100 |" in page
    assert "20.100 after (+0.50%)" in page and "eyes 6, align 6, answers 6" in page
