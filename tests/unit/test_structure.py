"""The architecture, held by tests: which room may import which, who may touch llama.cpp, how long files may be."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pasture

SOURCE = Path(pasture.__file__).parent

MAY_IMPORT: dict[str, set[str]] = {
    "core": set(),
    "config": {"core"},
    "engine": {"core"},
    "kv": {"core"},
    "tiers": {"core"},
    "foresight": {"core", "kv", "tiers"},
    "cluster": {"core", "tiers", "foresight"},
    "fleet": {"core", "config", "engine", "stores", "scheduler", "sessions", "tiers", "api", "server", "cluster"},
    "scheduler": {"core", "kv"},
    "text": {"core"},
    "sessions": {"core"},
    "web": {"core"},
    "observe": {"core"},
    "api": {"core", "text", "scheduler", "sessions", "web"},
    "bench": {"core"},
    "stores": {"core", "config", "tiers", "foresight"},
    "server": {"core", "config", "engine", "stores", "scheduler", "text", "sessions", "api"},
    "herd": {"core", "config", "engine", "scheduler", "text", "api", "server"},
    "cli": {"core", "config", "engine", "tiers", "foresight", "sessions", "server", "bench", "observe", "cluster", "fleet"},
    "__init__": {"core", "config", "herd"},
    "__main__": {"cli"},
}
"""The room -> the rooms it may import. `server`, `herd` and `cli` put the others together; nothing imports them back."""

MAY_IMPORT_LLAMA = {"engine/bindings.py", "bench/isolated.py"}
"""The engine, and the baseline it is measured against."""

HEAVY_AT_IMPORT = {"llama_cpp", "fastapi", "uvicorn", "openai", "plotly", "httpx", "sqlalchemy", "ray", "redis", "llguidance"}
"""What `import pasture` and `pasture --help` must not wait for."""


def modules() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[str]:
    """Full names of the modules that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms_imported(path: Path) -> set[str]:
    parts = [name.split(".") for name in imported(path) if name == "pasture" or name.startswith("pasture.")]
    named = {[*part, "__init__"][1] for part in parts}
    return {room if room in MAY_IMPORT else "__init__" for room in named} - {room_of(path)}


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_imports_point_one_way(path: Path) -> None:
    room = room_of(path)
    assert room in MAY_IMPORT, f"{room} is a new room: say in MAY_IMPORT what it may import"
    allowed = MAY_IMPORT[room] | ({"__init__"} if room in {"cli", "api", "server", "bench"} else set())
    assert rooms_imported(path) <= allowed


def test_the_import_table_has_no_cycle() -> None:
    remaining = {room: set(needs) for room, needs in MAY_IMPORT.items()}
    while remaining:
        ready = {room for room, needs in remaining.items() if not needs & remaining.keys()}
        assert ready, f"a cycle among {sorted(remaining)}"
        remaining = {room: needs for room, needs in remaining.items() if room not in ready}


def test_only_the_engine_knows_llama_cpp() -> None:
    users = {name_of(path) for path in modules() if any(name.split(".")[0] == "llama_cpp" for name in imported(path))}
    assert users <= MAY_IMPORT_LLAMA


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_files_and_functions_have_one_subject(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 550, "two nouns live in this file"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or node.lineno) - node.lineno <= 60, f"{node.name} does more than one thing"


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_every_module_says_what_it_owns(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert not tree.body or ast.get_docstring(tree), "a module without a docstring"


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    script = "import sys, pasture, pasture.cli.main; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert not HEAVY_AT_IMPORT & set(found)


def test_public_names_exist_and_are_documented() -> None:
    for name in pasture.__all__:
        value = getattr(pasture, name)
        assert isinstance(value, str) or value.__doc__, f"pasture.{name} has no docstring"
