"""Who may import whom: downward only, no circles, third-party packages only where they belong."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "src" / "ridgeline"

LEVELS = {
    "core": 1,
    "text": 2,
    "kv": 2,
    "ops": 3,
    "kernels": 4,
    "models": 4,
    "schedule": 4,
    "run": 5,
    "perf": 6,
    "speculate": 6,
    "engine": 7,
    "workload": 8,
    "llm": 8,
    "dashboard": 8,
    "study": 9,
    "server": 9,
    "cli": 10,
    "assets": 0,
}

PACKAGES = {
    "torch": {"ops", "kernels", "models", "run", "speculate", "perf", "engine", "study", "llm", "kv.pages"},
    "numpy": {"kernels", "run", "speculate", "workload", "study", "kv.pages"},
    "numba": {"kernels"},
    "llvmlite": {"kernels"},
    "triton": {"kernels"},
    "cuda": {"kernels"},
    "safetensors": {"models"},
    "huggingface_hub": {"models"},
    "tokenizers": {"text"},
    "sentencepiece": {"text"},
    "jinja2": {"text"},
    "typer": {"cli"},
    "rich": {"cli"},
    "tqdm": {"cli", "llm"},
    "transformers": {"study.profile"},
    "matplotlib": {"study"},
    "fastapi": {"server"},
    "starlette": {"server"},
    "uvicorn": {"server"},
    "h11": {"server"},
    "pydantic": {"server"},
    "opentelemetry": {"server"},
    "prometheus_client": {"server"},
    "llguidance": {"text"},
    "flashinfer": {"study"},  # a peer that is measured where it is there; no dependency
}
"""Third-party package -> folders (or single modules) that may import it. Any other package: nowhere."""

MODULES = sorted(ROOT.rglob("*.py"))


def name_of(path: Path) -> str:
    """Dotted name below `ridgeline` ("" for the package itself)."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULE_NAMES = {f"ridgeline.{name_of(path)}" for path in MODULES}


def imports_of(path: Path) -> set[str]:
    """Every module that a file imports, lazily or for types included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = whole & MODULE_NAMES
            found.update(modules)
            if modules != whole:
                found.add(node.module)
    return found


def folder_of(name: str) -> str:
    return name.split(".")[0]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_downward(path: Path) -> None:
    name = name_of(path)
    if not name:
        return
    own = folder_of(name)
    assert own in LEVELS, f"folder {own} has no level"
    for imported in imports_of(path):
        if not imported.startswith("ridgeline.") or imported == "ridgeline.__version__":
            continue
        other = imported.split(".")[1]
        if other == own or other not in LEVELS:
            continue
        assert LEVELS[other] < LEVELS[own], f"{name} imports {imported}: a sibling or something above it"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_third_party_packages_stay_where_they_belong(path: Path) -> None:
    name = name_of(path)
    for imported in imports_of(path):
        package = imported.split(".")[0]
        if package == "ridgeline" or package in sys.stdlib_module_names:
            continue
        assert package in PACKAGES, f"{name} imports {package}, which no folder may"
        allowed = PACKAGES[package]
        assert folder_of(name) in allowed or name in allowed, f"{name} may not import {package}"


def test_no_circles() -> None:
    graph: dict[str, set[str]] = {}
    names = {name_of(path) for path in MODULES}
    for path in MODULES:
        targets = {one.removeprefix("ridgeline.") for one in imports_of(path) if one.startswith("ridgeline.")}
        graph[name_of(path)] = {one for one in targets if one in names and one != name_of(path)}
    done: set[str] = set()
    trail: list[str] = []

    def visit(name: str) -> None:
        assert name not in trail, f"a circle of imports: {' -> '.join([*trail[trail.index(name) :], name])}"
        if name in done:
            return
        trail.append(name)
        for target in sorted(graph[name]):
            visit(target)
        trail.pop()
        done.add(name)

    for name in sorted(graph):
        if name:
            visit(name)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_every_module_says_what_it_knows(path: Path) -> None:
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert doc, f"{path} opens without a paragraph"


def test_only_build_constructs() -> None:
    """Engines, schedulers, executors and pages are made in engine/build.py alone, virtual ones beside it."""
    made = {"Engine", "Scheduler", "TorchExecutor", "Pages", "Runner", "KVCache"}
    for path in MODULES:
        if name_of(path) in ("engine.build", "engine.virtual"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in made, f"{name_of(path)} constructs {node.func.id}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_names(path: Path) -> None:
    assert path.name != "utils.py"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef):
            assert not node.name.startswith("Base")
            assert not node.name.endswith("Manager")
