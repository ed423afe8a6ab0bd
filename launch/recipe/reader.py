"""A recipe becomes a config: YAML, derived from other files by `extends:`, changed by dotted overrides,
validated key by key.

A file of configs/ and overrides such as `optimizer.lr=1e-3` come in. Out comes a PretrainRecipe or a
FinetuneRecipe, every value typed and bounded, or UserError with one sentence for each mistake. Paths in
values are relative to the working directory, those of `extends:` to the file that names them. Recipes read
only environment variables whose name begins with TRIFOLD_, because the config is written into the run folder,
its checkpoints and the model card; for the same reason no value may hold a password.
"""

import os
import re
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

from trifold.launch.recipe.errors import show_value, validate
from trifold.launch.recipe.schema import AnyRecipe, FinetuneRecipe, PretrainRecipe, R, S
from trifold.launch.recipe.yaml_loader import MAX_BYTES, MAX_DEPTH, parse
from trifold.launch.terminal import mask_secrets
from trifold.modeling.errors import UserError
from trifold.modeling.settings import Settings
from trifold.pretrain.config.flatten import flatten
from trifold.pretrain.storage.atomic import replace_file
from trifold.pretrain.storage.storage import checkpoint_root
from trifold.pretrain.storage.storage_path import StoragePath

CLONE = Path(__file__).resolve().parents[2]  # the source tree, or the installed package: it has configs/ too
MAX_MERGES = 100  # files that a recipe extends, counted each time
PREFIX = "TRIFOLD_"  # of the environment variables that a recipe may read

Values = dict[str, Any]  # of a recipe, before they are validated
Origins = dict[str, str]  # by dotted key: the file or override that set it

_VARIABLE = re.compile(r"\$\{(\w+)\}")
_HOME_KEYS = ("run", "data.cache", "model.from", "tokenizer.path", "checkpoints.storage", "scoring.tasks.*")


def resolve(
    path: str | Path,
    overrides: list[str] | tuple[str, ...] = (),
    kind: type[R] = PretrainRecipe,  # type: ignore[assignment]
) -> R:
    """The config of a recipe, found from the working directory or beside Trifold's own, with overrides
    applied and `${TRIFOLD_NAME}` filled in.
    """
    file = _find_recipe(Path(path))
    values, origins = _Files().read(file)
    if file.name == "config.yaml" and (file.parent / "events.jsonl").exists():
        values["run"] = str(file.parent)  # of a run folder: that run, wherever it was moved
    _override(values, origins, overrides)

    actual = FinetuneRecipe if "task" in values else PretrainRecipe if "objective" in values else kind
    if actual is not kind:
        purpose = "fine-tuning" if actual is FinetuneRecipe else "pretraining"
        raise UserError(f"{file} is a {purpose} recipe: use `trifold {actual.command}`.")
    return validate(kind, _finish(values, origins, str(file)), origins, file)


def resolve_any(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> AnyRecipe:
    """The config of a recipe of either kind: one with a `task` fine-tunes."""
    values, _ = _Files().read(_find_recipe(Path(path)))
    return resolve(path, overrides, FinetuneRecipe) if "task" in values else resolve(path, overrides)


def checkpoint_root_of_run(run: Path) -> StoragePath:
    """Where the run of a folder keeps its checkpoints: as its config.yaml says, or in the folder itself where
    it has none.
    """
    file = run / "config.yaml"
    storage = resolve_any(file).checkpoints.storage if file.exists() else None
    return checkpoint_root(run, storage)


def apply_overrides(settings: S, overrides: list[str]) -> S:
    """A group of settings with overrides applied."""
    values: Values = settings.model_dump(mode="json")
    origins: Origins = {}
    _override(values, origins, overrides)
    return validate(type(settings), values, origins, "the command line")


def write(config: Settings, path: Path) -> None:
    """Write a config as YAML that `resolve` reads back. The file appears complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    replace_file(path, text)


# ---- files


class _Files:
    """Reads a recipe with the files that it extends, each of them once."""

    def __init__(self) -> None:
        self._read: dict[Path, tuple[Values, Origins]] = {}
        self._merges = 0

    def read(self, file: Path, chain: tuple[Path, ...] = ()) -> tuple[Values, Origins]:
        """The values of a file over those that it extends, and the origin of each. `chain` are the files that
        extend it.
        """
        path = file.resolve()
        if path in chain:
            names = [link.name for link in (*chain[chain.index(path) :], path)]
            raise UserError(f"{file} extends itself: {' -> '.join(names)}.")
        if path not in self._read:
            if len(chain) >= MAX_DEPTH:
                raise UserError(f"{file}: a recipe extends others at most {MAX_DEPTH} levels deep.")
            self._read[path] = self._derive(file, (*chain, path))
        values, origins = self._read[path]
        return dict(values), dict(origins)

    def _derive(self, file: Path, chain: tuple[Path, ...]) -> tuple[Values, Origins]:
        values = _load(file)
        bases = values.pop("extends", [])
        merged: Values = {}
        origins: Origins = {}
        for base in bases if isinstance(bases, list) else [bases]:
            self._merges += 1
            if self._merges > MAX_MERGES:
                raise UserError(f"{file}: a recipe extends at most {MAX_MERGES} files.")
            candidates = [file.parent / base, CLONE / base] if isinstance(base, str) else []
            existing = [candidate for candidate in candidates if _is_file(candidate)]
            if not existing:
                raise UserError(
                    f"{file}: extends names {show_value(base)}; there is no such file in"
                    f" {chain[-1].parent} or among"
                    f" the recipes that come with Trifold ({CLONE / 'configs'})."
                )
            base_values, base_origins = self.read(existing[0], chain)
            merged, origins = _merge(merged, base_values), origins | base_origins
        return _merge(merged, values), origins | dict.fromkeys(flatten(values), str(file))


def _find_recipe(path: Path) -> Path:
    for candidate in (path, CLONE / path):
        if _is_file(candidate):
            return candidate
    folders = dict.fromkeys(map(str, (Path.cwd(), CLONE)))
    raise UserError(f"there is no recipe {path} in {' or in '.join(folders)}.")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or has a NUL
        return False


def _load(file: Path) -> Values:
    try:
        with file.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise UserError(f"{file} is larger than {MAX_BYTES / 1e6:g} MB, which no recipe is.")
        values = parse(content.decode("utf-8"), str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read as UTF-8 text: {error}.") from None
    if not isinstance(values, dict):
        raise UserError(f"{file} holds {show_value(values)}; a recipe is a mapping of keys to values.")
    return values


def _merge(below: Any, above: Any) -> Any:
    """Mappings merge key by key; anything else, lists too, is replaced."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    merged = dict(below)
    for key, value in above.items():
        merged[key] = _merge(below[key], value) if key in below else value
    return merged


# ---- overrides


def _override(values: Values, origins: Origins, overrides: Iterable[str]) -> None:
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(
                f"the override {override!r} is not of the form key=value, as in optimizer.lr=1e-3."
            )
        if key.count(".") >= MAX_DEPTH:
            raise UserError(f"the override {key[:100]}... goes through more than {MAX_DEPTH} keys.")
        origin = f"the override {_shorten(override)}"
        _set(values, key, parse(text, origin))
        origins[key] = origin


def _set(values: Any, key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for name in parents:
        if isinstance(values, list):
            position = _position(values, name, key)
            values[position] = values = _copy(values[position])
        else:
            values[name] = values = _copy(values.get(name, {}))
        if not isinstance(values, dict | list):
            raise UserError(
                f"the override {key} goes through `{name}`, which holds {show_value(values)} and has no keys."
            )
    values[_position(values, last, key) if isinstance(values, list) else last] = value


def _copy(value: Any) -> Any:
    """A copy of a list or mapping: aliases of a file share one object, and an override changes only one
    place.
    """
    return value.copy() if isinstance(value, dict | list) else value


def _position(values: list[Any], name: str, key: str) -> int:
    if not (name.isascii() and name.isdecimal() and len(name) < 10 and int(name) < len(values)):
        raise UserError(
            f"the override {key}: `{name}` is not a position in a list of {len(values)}, counted from 0."
        )
    return int(name)


# ---- values


def _finish(values: Values, origins: Origins, file: str) -> Values:
    """Values with variables and `~` replaced. Raises UserError for text that no setting may hold."""

    def finish(value: Any, key: tuple[str, ...]) -> Any:
        if isinstance(value, dict):
            return {name: finish(inner, (*key, name)) for name, inner in value.items()}
        if isinstance(value, list):
            return [finish(inner, (*key, str(i))) for i, inner in enumerate(value)]
        if not isinstance(value, str):
            return value
        dotted = ".".join(key)
        origin = origins.get(dotted, file)
        text = _expand_home(_expand_variables(value, dotted, origin), dotted, origin)
        _check_text(text, dotted, origin)
        return text

    result: Values = finish(values, ())
    return result


def _expand_variables(value: str, key: str, origin: str) -> str:
    for name in _VARIABLE.findall(value):
        if not name.startswith(PREFIX):
            raise UserError(
                f"{origin}: `{key}` is {_shorten(value)!r}, and recipes read only environment variables whose"
                f" name begins with {PREFIX}. Rename it to {PREFIX}{name}, or give the value on the command"
                f" line: {key}=..."
            )
        if name not in os.environ:
            raise UserError(
                f"{origin}: `{key}` is {_shorten(value)!r}, and the environment variable {name} is not set."
                f" Set it, or give the value on the command line: {key}=..."
            )
    return _VARIABLE.sub(lambda match: os.environ[match[1]], value)


def _expand_home(value: str, key: str, origin: str) -> str:
    """`~` at the start of a path."""
    if not value.startswith("~") or not any(fnmatch(key, pattern) for pattern in _HOME_KEYS):
        return value
    path = os.path.expanduser(value)
    if path.startswith("~"):
        raise UserError(f"{origin}: `{key}` is {_shorten(value)!r}, and there is no such home folder.")
    return path


def _check_text(text: str, key: str, origin: str) -> None:
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(
            f"{origin}: `{key}` is {_shorten(text)!r}, which holds a NUL or is not valid Unicode."
        )
    if mask_secrets(text) != text:
        raise UserError(
            f"{origin}: `{key}` holds a password or key, which would be written into the run folder and its"
            " checkpoints. Give credentials in environment variables (AWS_ACCESS_KEY_ID and"
            " AWS_SECRET_ACCESS_KEY for s3://, HF_TOKEN for the hub) and leave them out of the recipe."
        )


def _shorten(text: str) -> str:
    return text if len(text) <= 200 else text[:197] + "..."
