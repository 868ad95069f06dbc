"""The hand-written package list is complete, and the light import stays light."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def packages_on_disk() -> set[str]:
    found = set()
    for package, folder in SETTINGS["package-dir"].items():
        for init in (ROOT / folder).rglob("__init__.py"):
            found.add(".".join([package, *init.parent.relative_to(ROOT / folder).parts]))
    return found


def test_every_package_is_listed() -> None:
    assert packages_on_disk() == set(SETTINGS["packages"])


def test_package_data_exists() -> None:
    folders = SETTINGS["package-dir"]
    for package, patterns in SETTINGS["package-data"].items():
        parent, _, name = package.rpartition(".")
        folder = ROOT / (folders[package] if package in folders else f"{folders[parent]}/{name}")
        for pattern in patterns:
            assert list(folder.glob(pattern)), f"{package}: nothing matches {pattern}"


def test_runtime_import_is_light() -> None:
    code = (
        "import sys, sparsec.runtime;"
        "heavy = {'onnx', 'tvm', 'networkx', 'rich', 'torch'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


BLOCKED = (
    "import sys\n"
    "for name in ('onnx', 'tvm', 'networkx', 'rich'):\n"
    "    sys.modules[name] = None\n"  # as if it were not installed
)


def test_without_the_compiler_packages_the_command_says_what_to_install() -> None:
    code = BLOCKED + (
        "from sparsec.cli import main\nsys.exit(main(['compile', 'a.onnx', '-o', 'a.so']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "pip install 'sparsec[compiler]'" in done.stderr


def test_without_the_compiler_packages_compile_model_says_what_to_install() -> None:
    code = BLOCKED + (
        "import sparsec\n"
        "from sparsec.errors import CompilerError\n"
        "try:\n    sparsec.compile_model\n"
        "except CompilerError as error:\n"
        "    sys.exit(0 if 'sparsec[compiler]' in str(error) else 1)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_torch_compress_says_what_to_install() -> None:
    code = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "from sparsec.cli import main\n"
        "data = ['--task', 'sst2', '--train', 'a.tsv', '--dev', 'a.tsv', '-o', 'out']\n"
        "sys.exit(main(['compress', 'folder', *data]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "pip install 'sparsec[compress]'" in done.stderr
