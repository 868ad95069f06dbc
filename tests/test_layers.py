"""Who may import whom: a module imports only lower ranks and its own package."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {
    "sparsec": "compiler",
    "sparsec.passes": "passes",
    "sparsec.codegen": "codegen",
    "sparsec.runtime": "runtime",
    "sparsec.models": "models",
}
RANKS = {
    "__version__": 0,
    "errors": 0,
    "files": 1,
    "sparse": 1,
    "ranges": 1,
    "rates": 1,
    "ir": 2,
    "target": 2,
    "frontend": 3,
    "interpreter": 3,
    "options": 3,
    "calibration": 4,
    "passes": 4,
    "codegen": 4,
    "runtime": 4,
    "calibration_text": 5,
    "tuning": 5,
    "fallback": 5,
    "stages": 6,
    "driver": 7,
    "tools": 8,
    "cli_compile": 9,
    "cli_compress": 9,
    "cli_timing": 9,
    "cli_tuning": 9,
    "cli": 10,
    "__main__": 11,
}
MODELS_MAY_USE = {"errors", "files", "sparse", "ranges"}
COMPRESS = "sparsec.models.compress"
MODELS_USERS = {"sparsec.tools.compress"}
ONNX_HOMES = {"frontend", "tools", "models"}  # tools read ONNX for `inspect` and `verify`
TVM_HOME = "codegen"


def modules() -> list[tuple[str, Path]]:
    found = []
    for package, folder in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            relative = path.relative_to(ROOT / folder).with_suffix("")
            parts = [p for p in relative.parts if p != "__init__"]
            found.append((".".join([package, *parts]), path))
    return found


def imports(path: Path) -> set[str]:
    return names_of(ast.walk(ast.parse(path.read_text())))


def names_of(nodes: Iterable[ast.AST]) -> set[str]:
    names: set[str] = set()
    for node in nodes:
        match node:
            case ast.Import(names=aliases):
                names |= {a.name for a in aliases}
            case ast.ImportFrom(module="sparsec", names=aliases):
                names |= {f"sparsec.{a.name}" for a in aliases}
            case ast.ImportFrom(module=str(module)):
                names.add(module)
    return names


def imports_at_top(path: Path) -> set[str]:
    """What is imported as soon as the module is: not inside functions."""
    return names_of(ast.parse(path.read_text()).body)


def part(module: str) -> str:
    pieces = module.split(".")
    return pieces[1] if len(pieces) > 1 else ""


@pytest.mark.parametrize(("module", "path"), modules(), ids=lambda x: str(x))
def test_imports_go_down(module: str, path: Path) -> None:
    here = part(module)
    for name in imports(path):
        there = part(name)
        if not name.startswith("sparsec.") or there == here or here == "":
            continue
        if here == "models":
            assert there in MODELS_MAY_USE, f"{module} imports {name}"
            continue
        if there == "models":
            assert module in MODELS_USERS, f"{module} imports {name}"
            continue
        assert RANKS[there] < RANKS[here], f"{module} imports {name}"


@pytest.mark.parametrize(("module", "path"), modules(), ids=lambda x: str(x))
def test_heavy_packages_have_a_home(module: str, path: Path) -> None:
    for name in imports(path):
        top = name.split(".")[0]
        if top == "onnx":
            assert part(module) in ONNX_HOMES, f"{module} imports onnx"
        if top == "tvm":
            assert part(module) == TVM_HOME, f"{module} imports TVM"
        if top == "matplotlib":
            assert part(module) == "tools", f"{module} imports matplotlib"
        if top == "ray":
            assert module == "sparsec.tuning.ray_nodes", f"{module} imports Ray"
        if top in {"torch", "transformers", "safetensors"}:
            assert part(module) == "models", f"{module} imports {top}"
        if top == "tokenizers":
            assert part(module) in {"models", "calibration_text"}, f"{module} imports {top}"


def test_torch_is_imported_at_the_top_in_its_own_package_only() -> None:
    heavy = {"torch", "transformers", "tokenizers", "safetensors"}
    for module, path in modules():
        top_level = {n.split(".")[0] for n in imports_at_top(path)}
        names = {n for n in imports_at_top(path) if n.startswith(f"{COMPRESS}.")}
        if not module.startswith(f"{COMPRESS}."):
            assert not top_level & heavy, f"{module} imports {top_level & heavy} at its top"
            assert not names, f"{module} imports {names} at its top, and torch with it"


def test_loader_is_one_file() -> None:
    allowed = {"ctypes", "numpy", "sparsec"}
    stdlib = __import__("sys").stdlib_module_names
    for name in imports(ROOT / "runtime" / "loader.py"):
        top = name.split(".")[0]
        assert top in stdlib or top in allowed - {"sparsec"}, f"loader.py imports {name}"
