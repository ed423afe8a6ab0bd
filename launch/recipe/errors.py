"""One sentence per invalid recipe key: where it was set, its value, what is allowed, the nearest match.

Plain values and the origin of each come in; typed settings, or UserError with all sentences, come out.
"""

import difflib
import json
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, Tag, ValidationError
from pydantic.fields import FieldInfo

from trifold.modeling.errors import UserError

T = TypeVar("T", bound=BaseModel)
Location = tuple[int | str, ...]  # as pydantic gives it, with the tags of unions

MAX_SENTENCES = 20
MAX_KEYS = 10  # unknown keys that one sentence lists
MAX_LENGTH = 1000  # of a sentence

_UNIONS = (Union, types.UnionType)
_TYPE_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    type(None): "null",
}
_NUMBER_BOUNDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}


def validate(kind: type[T], values: dict[str, Any], origins: dict[str, str], file: Path | str) -> T:
    """Values as a `kind`, or UserError with a sentence for each mistake, which names the file or override
    that set the key (`origins`).
    """
    try:
        # through JSON: lists become tuples, and nothing else changes its type
        return kind.model_validate_json(json.dumps(values))
    except ValidationError as error:
        raise UserError("\n".join(_Explanation(kind, error, origins, file).lines())) from None


def show_value(value: Any) -> str:
    """A value as it would stand in a recipe, with its type in words."""
    if value is None:
        return "null"
    words = {dict: "a mapping", list: "a list", **_TYPE_WORDS}
    text = json.dumps(value, ensure_ascii=False)
    return f"{text if len(text) < 60 else text[:57] + '...'} ({words.get(type(value), type(value).__name__)})"


class _Target(NamedTuple):
    """What the settings say about a location."""

    key: str  # dotted
    allowed: str  # its type and bounds in words
    siblings: list[str]  # the keys next to it


class _Explanation:
    """Turns pydantic's errors into sentences."""

    def __init__(
        self, kind: type[BaseModel], error: ValidationError, origins: dict[str, str], file: Path | str
    ) -> None:
        self.kind, self.origins, self.file = kind, origins, file
        self.mistakes = error.errors()
        self.unknown: dict[Location, list[str]] = {}  # unknown keys by the group of settings they are in
        for mistake in self.mistakes:
            if mistake["type"] == "extra_forbidden":
                self.unknown.setdefault(mistake["loc"][:-1], []).append(str(mistake["loc"][-1]))

    def lines(self) -> list[str]:
        """The first sentences, each once and of bounded length, and how many mistakes there are in all."""
        lines: dict[str, None] = {}
        for sentence in self.sentences():
            if len(lines) == MAX_SENTENCES:
                return [*lines, f"These are the first of {len(self.mistakes):,} mistakes."]
            lines[sentence if len(sentence) <= MAX_LENGTH else sentence[: MAX_LENGTH - 3] + "..."] = None
        return list(lines)

    def sentences(self) -> Iterator[str]:
        explained: set[Location] = set()  # groups of settings whose unknown keys are listed
        for mistake in self.mistakes:
            location, problem = mistake["loc"], mistake["type"]
            if problem == "too_short" and self._has_mistake_inside(location):
                continue  # short only because an item is invalid, which has its own sentence
            if problem != "extra_forbidden":
                yield self._sentence(mistake)
            elif len(self.unknown[location[:-1]]) <= 2:
                yield self._unknown_key(location)
            elif location[:-1] not in explained:
                explained.add(location[:-1])
                yield self._unknown_keys(location)

    def _has_mistake_inside(self, location: Location) -> bool:
        inside = (mistake["loc"] for mistake in self.mistakes if len(mistake["loc"]) > len(location))
        return any(other[: len(location)] == location for other in inside)

    def _unknown_key(self, location: Location) -> str:
        key, _, siblings = _target(self.kind, location)
        nearest = _nearest(key, siblings, known_keys(self.kind))
        return f"{self._origin(key)}: there is no key `{key}`; {nearest}"

    def _unknown_keys(self, location: Location) -> str:
        """One sentence for several, as when `model.from` meets a recipe that gives a shape too."""
        key, _, siblings = _target(self.kind, location)
        parent = key.rpartition(".")[0]
        names = self.unknown[location[:-1]]
        listed = ", ".join(names[:MAX_KEYS])
        if len(names) > MAX_KEYS:
            listed += f" and {len(names) - MAX_KEYS:,} more"
        group = f"`{parent}`" if parent else "a recipe"
        return (
            f"{self._origin(parent)}: {group} has no keys {listed}; with what else it says, it has"
            f" {', '.join(siblings)}."
        )

    def _sentence(self, mistake: Any) -> str:
        value, problem = mistake["input"], mistake["type"]
        key, allowed, _ = _target(self.kind, mistake["loc"])
        if problem.startswith("union_tag"):
            key, allowed = f"{key}.kind", allowed.removeprefix("a mapping whose kind is ")
            value = value.get("kind")
        origin = self._origin(key)
        if problem == "value_error":
            prefix = f"`{key}`: " if key else ""
            return f"{origin}: {prefix}{mistake['ctx']['error']}."
        if problem in ("missing", "union_tag_not_found"):
            return f"{origin}: `{key}` is missing; it must be {allowed}."

        near: list[str] = []
        if allowed.startswith("one of"):
            near = difflib.get_close_matches(str(value)[:100], re.findall(r"[\w-]+", allowed), 1)
        question = f" Did you mean {near[0]}?" if near else ""
        return f"{origin}: `{key}` is {show_value(value)}; it must be {allowed}.{question}"

    def _origin(self, key: str) -> str:
        """Where a key was set; else the nearest one above or below it."""
        names = key.split(".")
        for length in range(len(names), 0, -1):
            prefix = ".".join(names[:length])
            if prefix in self.origins:
                return self.origins[prefix]
            for known in reversed(self.origins):
                if known.startswith(prefix + "."):
                    return self.origins[known]
        return str(self.file)


def _nearest(key: str, siblings: list[str], known: list[str]) -> str:
    """The known key most like this one: a sibling first, else the same last word elsewhere; else all
    siblings.
    """
    parent, dot, last = key.rpartition(".")
    near = [f"{parent}{dot}{word}" for word in difflib.get_close_matches(last[:100], siblings, 1)]
    near += [name for name in known if name.rpartition(".")[2] == last and name != key]
    return f"did you mean `{near[0]}`?" if near else f"known there: {', '.join(siblings)}."


def known_keys(annotation: Any, prefix: str = "") -> list[str]:
    """Every dotted key below a type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        keys = []
        for name, field in _fields(annotation).items():
            keys.append(prefix + name)
            keys += known_keys(field.annotation, f"{prefix}{name}.")
        return keys
    if get_origin(annotation) is tuple:
        return known_keys(get_args(annotation)[0], f"{prefix}0.")
    return [key for inner in get_args(annotation) for key in known_keys(inner, prefix)]


def _fields(kind: type[BaseModel]) -> dict[str, FieldInfo]:
    """The fields by the names that a recipe gives them (`from` cannot be a name in Python)."""
    return {field.alias or name: field for name, field in kind.model_fields.items()}


def _target(kind: type[BaseModel], location: Location) -> _Target:
    """Follow a location of pydantic, which holds tags of unions that are no keys, through the settings."""
    annotation: Any = kind
    field: FieldInfo | None = None
    names: list[str] = []
    siblings: list[str] = []
    for name in location:
        choices = _choices(annotation)
        if len(choices) > 1 and name in choices:
            annotation = choices[name]
            continue
        names.append(str(name))
        fields = _fields(next(iter(choices.values()))) if choices else {}
        siblings = list(fields)
        if get_origin(annotation) is tuple:
            annotation, field = get_args(annotation)[0], None
        elif get_origin(annotation) is dict:
            annotation, field = get_args(annotation)[1], None
        elif str(name) in fields:
            field = fields[str(name)]
            annotation = field.annotation
        else:
            annotation, field = None, None
    return _Target(".".join(names), _allowed(annotation, field.metadata if field else []), siblings)


def _choices(annotation: Any, tag: Any = None) -> dict[Any, type[BaseModel]]:
    """The groups of settings that a type allows, by the tag that pydantic puts into locations: the kind, else
    the tag that was given.
    """
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        kind = annotation.model_fields.get("kind")
        return {kind.default if kind else tag: annotation}
    inner = get_args(annotation)
    if get_origin(annotation) is Annotated:
        tags = [argument.tag for argument in inner[1:] if isinstance(argument, Tag)]
        return _choices(inner[0], tags[0] if tags else None)
    choices: dict[Any, type[BaseModel]] = {}
    if get_origin(annotation) in _UNIONS:
        for member in inner:
            choices |= _choices(member)
    return choices


def _allowed(annotation: Any, bounds: list[Any]) -> str:
    """A type and its bounds in words."""
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in _UNIONS:
        return _allowed_union(get_args(annotation), bounds)
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(map(str, get_args(annotation)))

    word = _TYPE_WORDS.get(annotation, "a mapping of keys to values")
    if get_origin(annotation) is tuple:
        word = "a list"
    signs: dict[str, str] = {}
    if annotation in (int, float):
        signs = _NUMBER_BOUNDS
    elif word in ("a list", "text"):
        signs = {"min_length": "its length at least"}

    limits = []
    for bound in bounds:
        for name, sign in signs.items():
            if (limit := getattr(bound, name, None)) is not None:
                limits.append(f"{sign} {limit}")
    return ", ".join([word, " and ".join(limits)]) if limits else word


def _allowed_union(members: tuple[Any, ...], bounds: list[Any]) -> str:
    if all(isinstance(member, type) and issubclass(member, BaseModel) for member in members):
        kinds = [member.model_fields["kind"].default for member in members]
        return "a mapping whose kind is one of " + ", ".join(kinds)
    return " or ".join(dict.fromkeys(_allowed(member, bounds) for member in members))
