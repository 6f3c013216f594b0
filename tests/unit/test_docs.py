"""The documentation names what exists, and nothing else: settings, flags, commands, routes, metrics, links, names in Python."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import pasture
from pasture.cli.main import app
from pasture.config import load_configuration, setting_specs

ROOT = Path(__file__).parents[2]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *DOCS]

RAYS_FLAGS = {"--head", "--node-ip-address", "--include-dashboard", "--generate"}
"""of `ray`, which the guide to clusters uses"""

FOREIGN_FLAGS = RAYS_FLAGS | {
    "--slot-save-path",
    "--kv-unified",
    "--no-kv-unified",
    "--no-repack",
    "--repack",
    "--no-webui",
    "--cache-ram",
    "--jinja",
    "--metrics",
    "--slots",
}
"""of llama-server, which the documentation compares with"""

MADE_WITH_THE_SITE = {"reference.md"}


def text(*names: str) -> str:
    return "\n".join((ROOT / "docs" / name).read_text() for name in names)


def flags_of(name: str, *, hidden: bool = False) -> set[str]:
    command: Any = get_command(app)
    for word in name.split():
        command = command.commands[word]
    return {
        flag
        for parameter in command.params
        for flag in (*parameter.opts, *parameter.secondary_opts)
        if flag.startswith("-") and (hidden or not getattr(parameter, "hidden", False))
    }


def commands() -> list[str]:
    """All that do something; those of a group with the group's name before them."""
    top: Any = get_command(app)
    groups = {name: getattr(command, "commands", None) for name, command in top.commands.items()}
    return sorted(
        [name for name in groups if not groups[name]] + [f"{name} {sub}" for name in groups for sub in groups[name] or ()]
    )


def test_every_setting_has_its_row_with_its_flags() -> None:
    page = text("configuration.md")
    for spec in setting_specs().values():
        if spec.flag.hidden:
            continue
        names = ", ".join(f"`{name}`" for name in filter(None, (*spec.flag.names, spec.flag.off)))
        assert f"| `{spec.name}` | {names} |" in page, f"docs/configuration.md has no row for {spec.name}"
        assert f" {spec.help} |" in page, f"docs/configuration.md says something else about {spec.name}"


def test_no_row_for_a_setting_that_is_gone() -> None:
    tables, _ = text("configuration.md").split("## How the pool is sized")
    rows = re.findall(r"^\| `(\w+)` \| `-", tables, re.MULTILINE)
    assert set(rows) == {name for name, spec in setting_specs().items() if not spec.flag.hidden}


def test_every_setting_has_an_environment_variable_and_a_toml_key() -> None:
    for name, spec in setting_specs().items():
        assert spec.env_name == f"PASTURE_{name.upper()}"
        assert name == name.lower()
        assert tomllib.loads(f"{name} = 1") == {name: 1}, "a bare key of TOML"
        assert spec.help.endswith("."), f"{name}: help is a sentence"


def test_the_services_example_is_a_configuration() -> None:
    configuration = load_configuration(config_file=ROOT / "deploy" / "pasture.toml")
    assert configuration.settings.model == "/srv/models/model.gguf"


def test_every_command_and_every_flag_is_documented() -> None:
    pages = "\n".join(page.read_text() for page in DOCS)
    for command in commands():
        assert f"pasture {command}" in pages, f"pasture {command} is nowhere in the documentation"
        for flag in flags_of(command):
            assert re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", pages), f"{flag} of pasture {command} is undocumented"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_flag_that_is_mentioned_exists(page: Path) -> None:
    existing = {flag for command in commands() for flag in flags_of(command, hidden=True)} | FOREIGN_FLAGS
    existing |= {"--version", "--help", "-h", "--install-completion", "--show-completion"}
    ours = "\n".join(
        line for line in page.read_text().splitlines() if not re.search(r"\b(pip|cmake|git|curl|systemctl|podman)\b", line)
    )
    mentioned = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+[a-z](?![\w])", ours))
    assert mentioned <= existing


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text())
    for target in targets:
        if not target.startswith(("http://", "https://")) and target not in MADE_WITH_THE_SITE:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_python_interface_is_documented() -> None:
    page = text("api.md")
    for name in ("open", "Reply", *(name for name in vars(pasture.Herd) if not name.startswith("_"))):
        assert re.search(rf"\b{name}\b", page), f"{name} is not in docs/api.md"
    for option in pasture.GenerateOptions.__annotations__:
        assert f"`{option}" in page, f"the option {option} is not in docs/api.md"


def test_every_runtime_dependency_has_its_line() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    page = text("dependencies.md")
    for requirement in project["dependencies"]:
        name = re.split(r"[=<>;\[ ]", requirement)[0]
        assert f"| {name} |" in page, f"docs/dependencies.md says nothing about {name}"


def test_constraints_pin_everything_exactly_and_name_no_host() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[^\s/@]+", line) for line in lines)
    pinned = {line.split("==")[0] for line in lines}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in (*project["dependencies"], *project["optional-dependencies"]["dev"]):
        name = re.split(r"[=<>;\[ ]", requirement)[0].lower()
        assert name in pinned | {"pasture"}, f"constraints.txt does not pin {name}"


def test_versions_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == pasture.__version__
    assert f"## {pasture.__version__}" in (ROOT / "CHANGELOG.md").read_text()
