"""The house: few rooms at the door, imports that point downward, one name for one thing."""

import ast
from collections import defaultdict

from conftest import ROOT

ROOMS = (
    "data",
    "realdata",
    "infra",
    "scale",
    "kernels",
    "bench",
    "claims",
    "curation",
    "talk",
    "lessons",
    "serving",
    "harness",
    "smol",
    "tools",
)
FILES = sorted(ROOT.glob("*.py")) + [
    f for room in ROOMS for f in sorted((ROOT / room).glob("*.py"))
]
TREES = {
    ".".join(f.relative_to(ROOT).with_suffix("").parts): ast.parse(f.read_text()) for f in FILES
}


def imports_of(tree: ast.AST) -> set[str]:
    """Our own modules that a file imports, also inside its functions."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found & TREES.keys()


def test_imports_have_no_circle():
    above: list[str] = []
    done: set[str] = set()

    def visit(name: str) -> None:
        assert name not in above, " -> ".join([*above, name])
        if name in done:
            return
        above.append(name)
        for other in sorted(imports_of(TREES[name]) - {name}):
            visit(other)
        above.pop()
        done.add(name)

    for name in TREES:
        visit(name)


def test_models_know_nothing_of_ranks_files_or_recipes():
    low = {"infra.config", "infra.weights", "infra.cli"}
    models = {"attention", "llm", "moe", "vit", "adapter", "vlm"}
    for name in models:
        kernels = {"kernels.moe_triton", "kernels.block_triton", "kernels.npu"}
        allowed = models | low | kernels | {"tokenizer"}
        assert imports_of(TREES[name]) <= allowed, name


def test_no_recipe_imports_a_recipe():
    recipes = {"pretrain", "sft", "rl"}
    for name in recipes:
        assert not imports_of(TREES[name]) & recipes


def test_a_public_name_stands_once():
    places = defaultdict(list)
    for module, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                places[node.name].append(module)
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


def test_the_door_has_few_rooms():
    # 27 with serve.py: what people type stands at the door, as generate.py and evaluate.py do
    assert len(list(ROOT.glob("*.py"))) <= 27
