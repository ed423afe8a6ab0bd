"""The wheel works without a clone: it carries the recipes, and its command runs in an empty folder."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.paths import ROOT

RECIPE = """\
extends: configs/model/decoder-tiny.yaml
run: run
data: {sources: [{path: text.txt}], heldout_fraction: 0.1, row_length: 64}
objective: {kind: causal}
optimizer: {lr: 1e-3}
steps: 3
step_rows: 4
micro_rows: 2
"""


@pytest.mark.proof
def test_an_installed_wheel_finds_its_recipes_and_runs_in_an_empty_folder(tmp_path: Path) -> None:
    source = tmp_path / "source"  # a copy, because building writes beside pyproject.toml
    files = subprocess.check_output(["git", "-C", str(ROOT), "ls-files"], text=True).splitlines()
    for file in files:
        if (ROOT / file).is_file():
            (source / file).parent.mkdir(parents=True, exist_ok=True)
            (source / file).write_bytes((ROOT / file).read_bytes())
    options = ["--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, "-w", str(tmp_path), str(source)], check=True
    )
    [wheel] = tmp_path.glob("trifold-*.whl")

    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([str(python), "-m", "pip", "install", *options[:2], str(wheel)], check=True)
    [packages] = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])  # not installed again

    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "recipe.yaml").write_text(RECIPE)
    shown = _call(python, empty, "--help")
    assert "pretrain" in shown and "finetune" in shown
    code = (
        "import trifold.launch.recipe.reader as reader;"
        " print(reader.resolve('recipe.yaml').model.dim, reader.resolve('configs/demo/decoder.yaml').steps)"
    )
    assert subprocess.check_output([str(python), "-c", code], cwd=empty, text=True) == "128 120\n"
    assert "run" in _call(python, empty, "plan", "recipe.yaml", "--tokens-per-second", "1000")


def _call(python: Path, folder: Path, *arguments: str) -> str:
    command = [str(python.with_name("trifold")), *arguments]
    return subprocess.check_output(command, cwd=folder, text=True)
