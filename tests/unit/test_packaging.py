"""What is shipped: a wheel and an sdist that build without a network, hold the pages' files, and work where they are put."""

from __future__ import annotations

import configparser
import re
import shlex
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from pasture.cli.main import app
from pasture.config import setting_specs

ROOT = Path(__file__).parents[2]
STATIC = ROOT / "src" / "pasture" / "web" / "static"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", str(folder)], cwd=ROOT, check=True, capture_output=True, timeout=100
    )
    return folder


def test_the_wheel_holds_the_pages_and_nothing_else_of_the_repository(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    assert re.fullmatch(r"pasture-[\d.]+-py3-none-any\.whl", wheel.name)
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"pasture/web/static/{file.name}" for file in STATIC.iterdir()} <= names
    assert "pasture/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {name.split("/")[0] for name in names} == {"pasture", wheel.name.removesuffix("-py3-none-any.whl") + ".dist-info"}


def test_the_sdist_can_be_built_from(built: Path, tmp_path: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "src/pasture/web/static/index.html"} <= names
    assert not any(name.startswith((".venv", "site/", ".git/")) or name.endswith(".gguf") for name in names)


def test_the_wheel_installs_and_serves_its_pages_from_there(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    target = tmp_path / "installed"
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(target),
        str(wheel),
    ]
    subprocess.run(install, check=True, capture_output=True, timeout=100)
    script = "import pasture; from pasture.web.routes import static_files; print(pasture.__file__, *sorted(static_files()))"
    told = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={"PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
        check=True,
    )
    where, *pages = told.stdout.split()
    assert where.startswith(str(target))
    assert {"index.html", "chat.html", "dashboard.js", "style.css"} <= set(pages)
    entry_points = next(target.glob("pasture-*.dist-info/entry_points.txt")).read_text()
    assert "pasture = pasture.cli.main:main" in entry_points


def test_extras_name_what_exists_and_dev_has_them_all() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {
        name for need in extras["dev"] for name in re.findall(r"[a-z]+", "".join(re.findall(r"pasture\[([^\]]+)\]", need)))
    }
    assert named | {"dev", "bench"} == set(extras)


def test_the_systemd_unit_starts_a_command_that_is_one() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]  # systemd's names have capitals
    unit.read(ROOT / "deploy" / "pasture.service")
    program, *arguments = shlex.split(unit["Service"]["ExecStart"])
    assert program.endswith("/pasture")
    top: Any = get_command(app)
    top.commands[arguments[0]].make_context("pasture serve", arguments[1:])
    drain = setting_specs()["drain_timeout"].default
    assert isinstance(drain, float)
    assert int(unit["Service"]["TimeoutStopSec"]) > drain


def test_the_containerfile_copies_what_exists_and_sets_what_is_a_setting() -> None:
    text = (ROOT / "deploy" / "Containerfile").read_text()
    for line in re.findall(r"^COPY (?!--from)(.+)$", text, re.MULTILINE):
        for name in line.split()[:-1]:
            assert (ROOT / name).exists(), name
    known = {spec.env_name for spec in setting_specs().values()}
    assert set(re.findall(r"\bPASTURE_\w+", text)) <= known
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.findall(r"'\.\[(\w+)\]'", text)) <= set(extras)


def test_help_is_fit_for_a_newcomer() -> None:
    told = subprocess.run([sys.executable, "-m", "pasture", "--help"], capture_output=True, text=True, check=True)
    lines = told.stdout.splitlines()
    assert len(lines) < 60, "one screen"
    assert "Start here" in told.stdout
    top: Any = get_command(app)
    for name, command in top.commands.items():
        sentence = (command.help or command.callback.__doc__ or "").strip().splitlines()[0]
        assert sentence.endswith("."), f"pasture {name} says nothing of itself"
        assert name in told.stdout
