"""What README and the guide tell people to type exists: commands and options of the command line, targets of
the Makefile, recipes and the keys of their YAML examples.
"""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from tests.paths import ROOT
from trifold.launch.cli import app
from trifold.launch.recipe.reader import resolve_any

PAGES = (ROOT / "README.md", ROOT / "docs" / "guide.md", ROOT / "CONTRIBUTING.md")
COMMANDS = [
    line.split("#")[0].strip()
    for page in PAGES
    for line in page.read_text(encoding="utf-8").splitlines()
    if re.match(r"    (trifold|make) ", line)
]
YAML = [block for page in PAGES for block in re.findall(r"```yaml\n(.*?)```", page.read_text(), re.S)]
WHOLE = [block for block in YAML if "run:" in block]
FRAGMENTS = [block for block in YAML if "run:" not in block]


@pytest.mark.parametrize("command", sorted({part.strip() for line in COMMANDS for part in line.split("&&")}))
def test_every_command_of_the_pages_exists_with_its_options(command: str) -> None:
    program, *arguments = shlex.split(command)
    if program == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert all(
            re.search(rf"^{re.escape(target)}:", makefile, re.M) for target in arguments if "=" not in target
        )
        return
    command_or_group: Any = typer.main.get_command(app)
    while hasattr(command_or_group, "commands"):
        command_or_group = command_or_group.commands[arguments.pop(0)]
    options = {name for parameter in command_or_group.params for name in parameter.opts}
    assert {argument for argument in arguments if argument.startswith("-")} <= options
    for argument in arguments:
        if argument.startswith("configs/") and "*" not in argument:
            assert (ROOT / argument).is_file()


@pytest.mark.parametrize("text", WHOLE)
def test_every_whole_recipe_of_the_pages_resolves(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    monkeypatch.chdir(tmp_path)
    assert resolve_any(file).steps > 0


@pytest.mark.parametrize("text", FRAGMENTS)
def test_every_fragment_of_the_pages_fits_into_a_recipe(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIFOLD_DATA", str(tmp_path))
    base = (
        "configs/finetune/wnut17.yaml"
        if "task" in yaml.safe_load(text)
        else "configs/pretrain/books-decoder.yaml"
    )
    file = tmp_path / "recipe.yaml"
    file.write_text(f"extends: {base}\nsteps: 5000\n{text}")
    if "configs/" in text:
        monkeypatch.chdir(ROOT)
    assert resolve_any(file).steps > 0
