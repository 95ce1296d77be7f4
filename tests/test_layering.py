"""Who may import whom, read from the syntax tree: imports inside functions count too."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import unidad

ROOT = Path(unidad.__file__).parent
MODULES = sorted(p.relative_to(ROOT).with_suffix("").as_posix() for p in ROOT.rglob("*.py") if "assets" not in p.parts)
# The jobs and the programs that call them; everything else lies below.
TOP = {"train", "adapt", "pretrain", "reproduce", "bench", "plan", "cli", "commands", "evaluate_subject", "web", "__main__"}
LEAVES = ("noise", "data", "errors", "heads", "augment")


def imports(name: str) -> set[str]:
    """Modules of unidad that a module imports, as paths without suffix ("backbones/base")."""
    path = ROOT / f"{name}.py"
    package = ["unidad", *path.relative_to(ROOT).parts[:-1]]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) + "." if node.level else ""
            whole = (base + (node.module or "")).strip(".")
            found |= {f"{whole}.{alias.name}" for alias in node.names}
    return {m for m in (resolve(f) for f in found if f.split(".")[0] == "unidad") if m}


def resolve(dotted: str) -> str | None:
    """The module that `unidad.a.b.name` lives in."""
    parts = dotted.split(".")[1:]
    while parts:
        if "/".join(parts) in MODULES:
            return "/".join(parts)
        parts.pop()
    return None


def below(name: str) -> bool:
    return name.split("/")[0] not in TOP


def test_the_reader_of_imports_works():
    assert {"methods/base", "rollout", "losses", "backbones/base"} <= imports("methods/unidad")
    assert "checkpoint" in imports("train")


@pytest.mark.parametrize("name", [m for m in MODULES if below(m)])
def test_nothing_below_imports_the_top(name):
    assert {m for m in imports(name) if not below(m)} == set()


@pytest.mark.parametrize("name", LEAVES)
def test_leaves(name):
    assert imports(name) <= {"errors"}


def test_losses_and_checkpoint_are_nearly_leaves():
    assert imports("losses") <= {"noise"}
    assert imports("rollout") <= {"backbones/base", "noise"}
    assert imports("checkpoint") <= {"errors"}


def test_methods_do_not_know_a_single_architecture():
    for name in (m for m in MODULES if m.startswith("methods/")):
        assert {m for m in imports(name) if m.startswith("backbones/")} <= {"backbones/base"}


def test_no_circles():
    """Every module can be put after all it imports."""
    placed: set[str] = set()
    left = {m: imports(m) - {m} for m in MODULES}
    while left:
        ready = {m for m, needs in left.items() if needs <= placed}
        assert ready, f"a circle among {sorted(left)}"
        placed |= ready
        left = {m: needs for m, needs in left.items() if m not in ready}


@pytest.mark.parametrize("name", [m for m in MODULES if m != "info"])  # `unidad doctor` tries whether torchvision is broken
def test_what_breaks_machines_is_never_imported(name):
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    roots = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    roots |= {(n.module or "").split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert not roots & {"torchvision", "pickle", "lpips", "timm"}


@pytest.mark.parametrize("name", MODULES)
def test_files_stay_under_400_lines_and_functions_under_60(name: str) -> None:
    text = (ROOT / f"{name}.py").read_text()
    assert len(text.splitlines()) < 400
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = {f.name: f.end_lineno - f.lineno + 1 for f in functions if f.end_lineno is not None and f.end_lineno - f.lineno >= 59}
    assert not long
