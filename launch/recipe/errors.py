"""Values that are wrong, told key by key: in, plain values and where each was said; out, typed settings, or
one sentence for each mistake.

A sentence says where the key was given, what it holds, what it must be, and the nearest known key or value.
"""

import difflib
import json
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, Tag, ValidationError
from pydantic.fields import FieldInfo

from trifold.modeling.errors import UserError

T = TypeVar("T", bound=BaseModel)
_UNIONS = (Union, types.UnionType)


def validate(kind: type[T], values: dict[str, Any], origins: dict[str, str], file: Path | str) -> T:
    """Values as a `kind`, or UserError with a sentence for each mistake, which names the file or override that
    said it (`origins`).
    """
    try:
        return kind.model_validate_json(
            json.dumps(values)
        )  # JSON: lists become tuples, and nothing else changes its type
    except ValidationError as error:
        raise UserError("\n".join(dict.fromkeys(_sentences(kind, error, origins, file)))) from None


def _sentences(
    kind: type[BaseModel], error: ValidationError, origins: dict[str, str], file: Path | str
) -> Iterator[str]:
    mistakes = error.errors()
    unknown: dict[Any, list[str]] = {}
    for mistake in (mistake for mistake in mistakes if mistake["type"] == "extra_forbidden"):
        unknown.setdefault(mistake["loc"][:-1], []).append(str(mistake["loc"][-1]))
    for mistake in mistakes:
        loc, given, problem = mistake["loc"], mistake["input"], mistake["type"]
        if problem == "too_short" and any(
            other["loc"][: len(loc)] == loc and other is not mistake for other in mistakes
        ):
            continue  # short only because an item was refused, which is said already
        key, wanted, beside = _walk(kind, loc)
        if problem.startswith("union_tag"):
            key, wanted = f"{key}.kind", wanted.removeprefix("a mapping whose kind is ")
            given = given.get("kind")
        where = f"{_origin(key, origins, file)}: "
        if (
            problem == "extra_forbidden" and len(unknown[loc[:-1]]) > 2
        ):  # as when model.from meets a recipe that gives a shape too
            parent = key.rpartition(".")[0]
            origin = _origin(parent, origins, file)
            yield f"{origin}: `{parent}` has no keys {', '.join(unknown[loc[:-1]])}; with what else it says, it has {', '.join(beside)}."
        elif problem == "extra_forbidden":
            yield f"{where}there is no key `{key}`; {_nearest(key, beside, _known(kind))}"
        elif problem == "value_error":
            yield f"{where}{f'`{key}`: ' if key else ''}{mistake['ctx']['error']}."
        elif problem in ("missing", "union_tag_not_found"):
            yield f"{where}`{key}` is missing; it must be {wanted}."
        else:
            near = (
                difflib.get_close_matches(str(given), re.findall(r"[\w-]+", wanted), 1)
                if wanted.startswith("one of")
                else []
            )
            yield f"{where}`{key}` is {show_value(given)}; it must be {wanted}." + (
                f" Did you mean {near[0]}?" if near else ""
            )


def _origin(key: str, origins: dict[str, str], file: Path | str) -> str:
    """Where a key, or else the nearest thing above or below it, was said."""
    parts = key.split(".")
    for length in range(len(parts), 0, -1):
        prefix = ".".join(parts[:length])
        for known, origin in reversed(origins.items()):
            if known == prefix or known.startswith(prefix + "."):
                return origin
    return str(file)


def _nearest(key: str, beside: list[str], known: list[str]) -> str:
    """The known key most like this one, beside it first, else the same last word elsewhere; else what is
    known beside it.
    """
    parent, dot, last = key.rpartition(".")
    near = [f"{parent}{dot}{word}" for word in difflib.get_close_matches(last, beside, 1)]
    near += [k for k in known if k.rpartition(".")[2] == last and k != key]
    return f"did you mean `{near[0]}`?" if near else f"known there: {', '.join(beside)}."


def _known(annotation: Any, prefix: str = "") -> list[str]:
    """Every dotted key below a type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [
            k
            for name, f in _fields(annotation).items()
            for k in (prefix + name, *_known(f.annotation, f"{prefix}{name}."))
        ]
    if get_origin(annotation) is tuple:
        return _known(get_args(annotation)[0], f"{prefix}0.")
    return [k for inner in get_args(annotation) for k in _known(inner, prefix)]


def _fields(kind: type[BaseModel]) -> dict[str, FieldInfo]:
    """The fields by the names that a recipe gives them (`from` cannot be a name in Python)."""
    return {field.alias or name: field for name, field in kind.model_fields.items()}


def _walk(kind: type[BaseModel], loc: tuple[int | str, ...]) -> tuple[str, str, list[str]]:
    """The dotted key of a pydantic location (without its union tags), what that key must be in words, and the
    keys beside it.
    """
    annotation: Any = kind
    field: FieldInfo | None = None
    parts: list[str] = []
    beside: list[str] = []
    for part in loc:
        choices = list(_choices(annotation).values())
        if len(choices) > 1 and part in _choices(annotation):
            annotation = _choices(annotation)[part]
            continue
        parts.append(str(part))
        beside = list(_fields(choices[0])) if choices else []
        if get_origin(annotation) in (tuple, dict):
            annotation, field = get_args(annotation)[get_origin(annotation) is dict], None
        elif choices and part in beside:
            field = _fields(choices[0])[str(part)]
            annotation = field.annotation
        else:
            annotation, field = None, None
    return ".".join(parts), _wanted(annotation, field.metadata if field else []), beside


def _choices(annotation: Any, tag: Any = None) -> dict[Any, type[BaseModel]]:
    """The groups of settings that a type allows, each by the tag that pydantic puts into locations: its kind,
    else the tag it was given.
    """
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        kind = annotation.model_fields.get("kind")
        return {kind.default if kind else tag: annotation}
    inner = get_args(annotation)
    if get_origin(annotation) is Annotated:
        return _choices(inner[0], next((a.tag for a in inner[1:] if isinstance(a, Tag)), None))
    return (
        {name: choice for a in inner for name, choice in _choices(a).items()}
        if get_origin(annotation) in _UNIONS
        else {}
    )


def _wanted(annotation: Any, bounds: list[Any]) -> str:
    annotation = get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation
    if get_origin(annotation) in _UNIONS:
        choices = get_args(annotation)
        if all(isinstance(c, type) and issubclass(c, BaseModel) for c in choices):
            return "a mapping whose kind is one of " + ", ".join(
                c.model_fields["kind"].default for c in choices
            )
        return " or ".join(dict.fromkeys(_wanted(choice, bounds) for choice in choices))
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(map(str, get_args(annotation)))
    words: dict[Any, str] = {
        int: "a whole number",
        float: "a number",
        str: "text",
        bool: "true or false",
        type(None): "null",
    }
    word = (
        "a list" if get_origin(annotation) is tuple else words.get(annotation, "a mapping of keys to values")
    )
    signs = (
        {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
        if annotation in (int, float)
        else {}
    )
    signs = {"min_length": "its length at least"} if word in ("a list", "text") else signs
    said = [
        f"{sign} {getattr(bound, name)}"
        for bound in bounds
        for name, sign in signs.items()
        if getattr(bound, name, None) is not None
    ]
    return ", ".join([word, *([" and ".join(said)] if said else [])])


def show_value(value: Any) -> str:
    if value is None:
        return "null"
    names = {
        dict: "a mapping",
        list: "a list",
        str: "text",
        bool: "true or false",
        int: "a whole number",
        float: "a number",
    }
    text = json.dumps(value, ensure_ascii=False)
    return f"{text if len(text) < 60 else text[:57] + '...'} ({names.get(type(value), type(value).__name__)})"
