"""The shape of the code: rooms import only rightwards, each vendor has one home, only launch/ reads argv and the environment."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("launch", "finetune", "pretrain", "modeling")  # each may import itself and what stands to its right
HOMES = {
    "ray": ("launch/",),
    "deepspeed": tuple(f"pretrain/{name}.py" for name in ("engine", "checkpoint", "slices", "muon", "lean", "compile")),
    "sentencepiece": ("pretrain/tokenizer.py", "launch/bench/data.py"),  # whose own speed ours is set beside
    "obstore": ("pretrain/objects.py",),
    "torchao": ("pretrain/fp8.py",),
    "datasets": ("pretrain/corpus.py", "finetune/"),
    "pyarrow": ("pretrain/words.py",),
    "transformers": ("pretrain/verify.py", "launch/bench/contenders.py"),  # the peers that training is set beside
    "matplotlib": ("launch/report.py", "launch/bench/report.py"),
    "mlflow": ("launch/trackers.py",),
    "wandb": ("launch/trackers.py",),
    "typer": ("launch/",),
    "rich": ("launch/",),
}
FILES = sorted(file.relative_to(ROOT).as_posix() for room in ROOMS for file in (ROOT / room).rglob("*.py"))


def imported(file: str) -> set[str]:
    """Top-level names of all modules that a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively, which hides the room"
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("file", FILES)
def test_rooms_import_only_rightwards(file):
    left = ROOMS[: ROOMS.index(file.split("/")[0])]
    assert not imported(file) & set(left), f"{file} imports from a room to its left"


@pytest.mark.parametrize("file", FILES)
def test_each_vendor_has_one_home(file):
    for vendor in imported(file) & HOMES.keys():
        assert file.startswith(HOMES[vendor]), f"{file} imports {vendor}, whose home is {' and '.join(HOMES[vendor])}"


@pytest.mark.parametrize("file", [f for f in FILES if f.startswith("modeling/")])
def test_models_know_no_disk_and_no_ranks(file):
    source = (ROOT / file).read_text(encoding="utf-8")
    assert not imported(file) & {"os", "pathlib", "io"} and "torch.distributed" not in source and "open(" not in source


@pytest.mark.parametrize("file", [f for f in FILES if not f.startswith("launch/")])
def test_command_line_and_environment_are_read_in_launch_only(file):
    reads = [
        node.lineno
        for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and (node.attr in ("getenv", "argv") or (node.attr == "environ" and not _written(node, file)))
    ]
    assert not reads, f"{file} reads argv or the environment in lines {reads}"


def _written(node: ast.Attribute, file: str) -> bool:
    """`os.environ[...] = ...` sets what a library reads; only reading is launch/'s business."""
    line = (ROOT / file).read_text(encoding="utf-8").splitlines()[node.lineno - 1]
    return "environ[" in line and "] = " in line


@pytest.mark.parametrize("file", FILES)
def test_no_file_is_long_and_none_is_a_drawer(file):
    assert len((ROOT / file).read_text(encoding="utf-8").splitlines()) <= 300
    assert not {"utils", "helpers", "common", "base", "manager"} & set(Path(file).stem.split("_"))
