"""A recipe from YAML: strict, derived from others by `extends:`, changed by dotted overrides, refused key by
key.

In: a file of configs/ and overrides such as `optimizer.lr=1e-3`. Out: a PretrainRecipe, every value typed and
bounded, or UserError with one sentence for each mistake. Paths in values are relative to where the command
runs, `extends:` is relative to the file that says it.
"""

import os
import re
from pathlib import Path
from typing import Any

import yaml

from trifold.launch.recipe.errors import show_value, validate
from trifold.launch.recipe.schema import AnyRecipe, FinetuneRecipe, PretrainRecipe, R, S
from trifold.modeling.errors import UserError
from trifold.modeling.settings import Settings
from trifold.pretrain.config.flatten import flatten
from trifold.pretrain.storage.storage import checkpoint_root
from trifold.pretrain.storage.storage_path import StoragePath

CLONE = Path(__file__).resolve().parents[2]  # recipes are found from here too, wherever the command runs


def resolve(
    path: str | Path,
    overrides: list[str] | tuple[str, ...] = (),
    kind: type[R] = PretrainRecipe,  # type: ignore[assignment]
) -> R:
    """The recipe of a file (found from here, else from the clone), with overrides applied and `${NAME}`
    filled in, checked.
    """
    file = _find_recipe(Path(path))
    values, origins = _read(file, ())
    if (
        file.name == "config.yaml" and (file.parent / "events.jsonl").exists()
    ):  # a run's own recipe: that run, wherever it was moved to
        values["run"] = str(file.parent)
    _override(values, origins, overrides)
    said = FinetuneRecipe if "task" in values else PretrainRecipe if "objective" in values else kind
    if said is not kind:
        raise UserError(
            f"{file} is a recipe of `trifold {said.command}`, and one of `trifold {kind.command}` is wanted"
            " here."
        )
    return validate(kind, _expand_environment(values, (), origins, file), origins, file)


def resolve_any(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> AnyRecipe:
    """The recipe of a file, of whichever kind it is: one with a `task` fine-tunes."""
    values, _ = _read(_find_recipe(Path(path)), ())
    return resolve(path, overrides, FinetuneRecipe) if "task" in values else resolve(path, overrides)


def checkpoint_root_of_run(run: Path) -> StoragePath:
    """Where the run of a folder keeps its checkpoints: as its config.yaml says, in the folder where it has
    none.
    """
    file = run / "config.yaml"
    storage = resolve_any(file).checkpoints.storage if file.exists() else None
    return checkpoint_root(run, storage)


def apply_overrides(standing: S, overrides: list[str]) -> S:
    """A group of settings with overrides."""
    values: dict[str, Any] = standing.model_dump(mode="json")
    origins: dict[str, str] = {}
    _override(values, origins, overrides)
    return validate(type(standing), values, origins, "the command line")


def write(recipe: Settings, path: Path) -> None:
    """The resolved recipe as YAML that `resolve` reads back; visible whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".fresh")
    fresh.write_text(
        yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True), encoding="utf-8"
    )
    fresh.replace(path)


# ---- reading


_PLAIN = ("null", "bool", "int", "float", "str", "seq", "map")


def _override(
    values: dict[str, Any], origins: dict[str, str], overrides: list[str] | tuple[str, ...]
) -> None:
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(
                f"the override {override!r} is not of the form key=value, as in optimizer.lr=1e-3."
            )
        _set(values, key, _parse(text, f"the override {override}"))
        origins[key] = f"the override {override}"


class _Yaml(yaml.SafeLoader):
    """Safe YAML with the plain values of YAML 1.2 (1e-3 is a number; no, on and 2026-11-20 are text) that
    refuses a key given twice.
    """

    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012 (PyYAML's own way)
    yaml_constructors = {  # noqa: RUF012 (no dates, sets or bytes, which no recipe can hold)
        tag: make
        for tag, make in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in _PLAIN
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key must be plain text", key.start_mark
                )
            if key.value in lines:
                again = f"`{key.value}` is already given in line {lines[key.value]}"
                raise yaml.constructor.ConstructorError(None, None, again, key.start_mark)
            lines[key.value] = key.start_mark.line + 1
            key.tag = "tag:yaml.org,2002:str"
        return super().construct_mapping(node, deep=True)


for _tag, _pattern, _starts in (
    ("null", r"~|null|", ["~", "n", ""]),
    ("bool", r"true|false", ["t", "f"]),
    ("int", r"[-+]?(0|[1-9][0-9_]*)", list("-+0123456789")),
    ("float", r"(?=.*[.eE])[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
):
    _Yaml.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _starts)


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Yaml)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{where}{line}: {error.problem or error.context}.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{where}: {str(error).splitlines()[0]}.") from None


def _find_recipe(path: Path) -> Path:
    for candidate in (path, CLONE / path):
        if candidate.is_file():
            return candidate
    raise UserError(
        f"there is no recipe {path}, looked for from"
        f" {' and from '.join(dict.fromkeys(map(str, (Path.cwd(), CLONE))))}."
    )


def _read(file: Path, chain: tuple[Path, ...]) -> tuple[dict[str, Any], dict[str, str]]:
    """Values of a file over those it extends, and for each dotted key where it was said last."""
    here = file.resolve()
    if here in chain:
        raise UserError(
            f"{file} extends itself: {' -> '.join(p.name for p in (*chain[chain.index(here) :], here))}."
        )
    try:
        values = _parse(file.read_text(encoding="utf-8"), str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read as UTF-8 text: {error}.") from None
    if not isinstance(values, dict):
        raise UserError(f"{file} holds {show_value(values)}; a recipe is a mapping of keys to values.")
    bases = values.pop("extends", [])
    merged: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for base in bases if isinstance(bases, list) else [bases]:
        candidates = [file.parent / base, CLONE / base] if isinstance(base, str) else []
        found = next((candidate for candidate in candidates if candidate.is_file()), None)
        if found is None:
            raise UserError(
                f"{file}: extends names {show_value(base)}; there is no such file in {here.parent} or among the"
                f" recipes that come with Trifold ({CLONE / 'configs'})."
            )
        below, below_origins = _read(found, (*chain, here))
        merged, origins = _merge(merged, below), origins | below_origins
    return _merge(merged, values), origins | dict.fromkeys(flatten(values), str(file))


def _merge(below: Any, above: Any) -> Any:
    """Mappings merge key by key; anything else, lists too, is replaced."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return below | {key: _merge(below[key], value) if key in below else value for key, value in above.items()}


def _set(values: Any, key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for part in parents:
        values = (
            values[_index(values, part, key)] if isinstance(values, list) else values.setdefault(part, {})
        )
        if not isinstance(values, dict | list):
            raise UserError(
                f"the override {key} goes through `{part}`, which holds {show_value(values)} and not keys of its"
                " own."
            )
    values[_index(values, last, key) if isinstance(values, list) else last] = value


def _index(values: list[Any], part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(values):
        raise UserError(
            f"the override {key}: `{part}` is not a place in a list of {len(values)}, which are numbered"
            " from 0."
        )
    return int(part)


def _expand_environment(value: Any, key: tuple[str, ...], origins: dict[str, str], file: Path) -> Any:
    """Values with `${NAME}` replaced from the environment."""
    if isinstance(value, dict):
        return {
            name: _expand_environment(inner, (*key, name), origins, file) for name, inner in value.items()
        }
    if isinstance(value, list):
        return [_expand_environment(inner, (*key, str(i)), origins, file) for i, inner in enumerate(value)]
    if not isinstance(value, str):
        return value
    for name in re.findall(r"\$\{(\w+)\}", value):
        if name not in os.environ:
            dotted = ".".join(key)
            raise UserError(
                f"{origins.get(dotted, file)}: `{dotted}` is {value!r}, and the environment variable {name}"
                " is not set."
                f" Set it, or give the value on the command line: {dotted}=..."
            )
    return re.sub(r"\$\{(\w+)\}", lambda match: os.environ[match[1]], value)
