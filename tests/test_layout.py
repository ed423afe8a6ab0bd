"""The shape of the code: which package may import which, where each dependency is used, and that no two files
import each other.

Each test lists all offenders, so that one run shows everything there is to fix.
"""

import ast
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.paths import ROOT

PACKAGES = ("modeling", "pretrain", "finetune", "launch")  # each imports itself and those before it

# Inside a package: a line imports from itself and the lines before it. A name is a file or a sub-package
# (with all below it).
LEVELS = {
    "modeling": (
        "errors settings",
        "attention config",
        "batch position",
        "recurrent sequence_parallel flops",
        "block",
        "heads",
        "transformer",
        "generation huggingface activation_memory lora",
    ),
    "pretrain": (
        "config distributed storage",
        "data monitor",
        "checkpoint evaluate",
        "engine publish",
        "config_changes initial_model progress session train",
        "run",
    ),
    "finetune": ("config", "examples rows", "tasks", "evaluation", "run"),
    "launch": (
        "recipe terminal",
        "bench rehearse watch",
        "cluster",
        "jobs",
        "commands",
        "compare demo",
        "cli",
    ),
}

# The only places that import a dependency: everything else goes through them.
HOMES = {
    "ray": ("launch/",),
    "deepspeed": ("pretrain/engine/",),
    "sentencepiece": ("pretrain/data/tokenizer/", "launch/bench/data.py"),
    "obstore": ("pretrain/storage/object_store.py",),
    "torchao": ("pretrain/engine/fp8.py",),
    "datasets": ("pretrain/data/corpus.py", "finetune/"),
    "pyarrow": ("pretrain/data/",),
    "transformers": ("pretrain/publish/verify.py", "launch/bench/contenders.py"),
    "matplotlib": ("launch/compare/report.py", "launch/bench/report.py"),
    "mlflow": ("launch/watch/trackers.py",),
    "wandb": ("launch/watch/trackers.py",),
    "typer": ("launch/",),
    "rich": ("launch/",),
}
MOST_LINES = 400


def test_packages_import_only_those_before_them() -> None:
    wrong = []
    for file, module in _edges():
        package, target = file.split("/")[0], module.split(".")[0]
        if PACKAGES.index(target) > PACKAGES.index(package):
            wrong.append(f"{file} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_sub_packages_import_in_one_direction() -> None:
    wrong = []
    for file, module in _edges():
        package, target = file.split("/")[0], module.split(".")[0]
        own, other = _level(package, file), _level(target, module.replace(".", "/"))
        if package == target and other > own:
            wrong.append(f"{file} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_every_file_has_a_level() -> None:
    known = {package: set(" ".join(lines).split()) for package, lines in LEVELS.items()}
    homeless = [
        file
        for file in _files()
        if not file.endswith("__init__.py") and _member(file) not in known[file.split("/")[0]]
    ]
    assert not homeless, "\n".join(homeless)


def test_no_two_files_import_each_other() -> None:
    graph: dict[str, set[str]] = {}
    for file, module in _edges():
        graph.setdefault(_module(file), set()).add(module)
    wrong = [
        f"{one} and {two}"
        for one in graph
        for two in graph[one]
        if one in _reached(graph, two) and one != two
    ]
    assert not wrong, "these import each other, perhaps through others:\n" + "\n".join(wrong)


def test_each_dependency_is_imported_in_its_place_only() -> None:
    wrong = []
    for file in _files():
        for name in _imported(file) & HOMES.keys():
            if not file.startswith(HOMES[name]):
                wrong.append(f"{file} imports {name}, which belongs in {' or '.join(HOMES[name])}")
    assert not wrong, "\n".join(wrong)


def test_models_touch_no_file_and_no_other_rank() -> None:
    wrong = []
    for file in _files():
        text = (ROOT / file).read_text(encoding="utf-8")
        touches = _imported(file) & {"os", "pathlib", "io"} or "torch.distributed" in text or "open(" in text
        if file.startswith("modeling/") and touches:
            wrong.append(file)
    assert not wrong, "\n".join(wrong)


def test_command_line_and_environment_are_read_in_launch_only() -> None:
    wrong = []
    for file in _files():
        lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
        for node in ast.walk(_tree(file)):
            if not isinstance(node, ast.Attribute) or node.attr not in ("getenv", "argv", "environ"):
                continue
            line = lines[node.lineno - 1]
            sets_it = "environ[" in line and "] = " in line  # setting what a library reads is fine
            if not file.startswith("launch/") and not sets_it:
                wrong.append(f"{file}:{node.lineno} {line.strip()}")
    assert not wrong, "\n".join(wrong)


def test_files_are_short_and_named_for_what_they_hold() -> None:
    long = [
        file for file in _files() if len((ROOT / file).read_text(encoding="utf-8").splitlines()) > MOST_LINES
    ]
    drawers = {"utils", "helpers", "common", "base", "manager"}
    vague = [file for file in _files() if drawers & set(Path(file).stem.split("_"))]
    assert not long and not vague, f"over {MOST_LINES} lines: {long}; named for nothing: {vague}"


def test_every_package_is_installed_typed_and_described() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    packages = {file.rpartition("/")[0] for file in _files()}
    listed = {name.removeprefix("trifold.").replace(".", "/") for name in settings["packages"]}
    assert packages == listed - {"configs"}
    assert [
        package for package in packages if "/" not in package and not (ROOT / package / "py.typed").exists()
    ] == []
    assert [package for package in packages if not ast.get_docstring(_tree(f"{package}/__init__.py"))] == []


def test_no_test_file_imports_another() -> None:
    wrong = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom):
                continue
            modules = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
            tests = [name for name in modules if name.split(".")[-1].startswith("test_")]
            if modules[0].startswith("tests") and tests:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} imports {tests[0]}")
    assert not wrong, "builders belong in a module of helpers:\n" + "\n".join(wrong)


def _files() -> list[str]:
    return sorted(
        file.relative_to(ROOT).as_posix() for package in PACKAGES for file in (ROOT / package).rglob("*.py")
    )


def _module(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@cache
def _tree(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text(encoding="utf-8"))


def _edges() -> Iterator[tuple[str, str]]:
    """(file, module without `trifold.`) of every import of our own, wherever in the file."""
    modules = {_module(file) for file in _files()}
    for file in _files():
        for node in ast.walk(_tree(file)):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file} imports relatively, which hides the package"
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("trifold."):
                continue
            source = (node.module or "").removeprefix("trifold.")
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                yield file, inner if inner in modules else source


def _member(path: str) -> str:
    """The file or sub-package of its package that a path belongs to."""
    return path.removesuffix(".py").split("/")[1] if "/" in path else ""


def _level(package: str, path: str) -> int:
    lines = LEVELS[package]
    return next((level for level, line in enumerate(lines) if _member(path) in line.split()), -1)


def _imported(file: str) -> set[str]:
    """Top-level names of all modules that a file imports."""
    names: set[str] = set()
    for node in ast.walk(_tree(file)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    return names


def _reached(graph: dict[str, set[str]], start: str) -> set[str]:
    """All that `start` imports, directly or through others."""
    reached, todo = set(), [start]
    while todo:
        for module in graph.get(todo.pop(), ()):
            if module not in reached:
                reached.add(module)
                todo.append(module)
    return reached
