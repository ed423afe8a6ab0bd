"""YAML as recipes use it: the plain values of YAML 1.2 (1e-3 is a number; no, on and 2026-11-20 are text), no
tags, no key twice, and a bounded size.

Aliases let a file of 300 bytes stand for 1e9 values, so what counts is the size after they are expanded.
Cost: a file within the bounds takes 2 s at most.
"""

import re
from typing import Any

import yaml

from trifold.modeling.errors import UserError

MAX_BYTES = 1_000_000  # of a file
MAX_NODES = 20_000  # keys, values, lists and mappings of a file, aliases expanded
MAX_DEPTH = 50

_PLAIN = ("null", "bool", "int", "float", "str", "seq", "map")


def parse(text: str, origin: str) -> Any:
    """The value of a YAML text. `origin` names the file or override in errors. Raises UserError."""
    try:
        return yaml.load(text, Loader=RecipeLoader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{origin}{line}: {error.problem or error.context}.") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{origin}: {str(error).splitlines()[0]}.") from None


class RecipeLoader(yaml.SafeLoader):
    """Composes a bounded tree of nodes and makes plain values of it."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012 (PyYAML's own way)
    yaml_constructors = {  # noqa: RUF012 (no dates, sets or bytes, which no recipe can hold)
        tag: constructor
        for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in _PLAIN
    }

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._depth = 0
        self._nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Compose a node within the bounds on depth and number."""
        event = self.peek_event()
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise _error(f"a recipe has at most {MAX_NODES:,} keys and values", event.start_mark)
        if self._depth > MAX_DEPTH:
            raise _error(f"a recipe is nested at most {MAX_DEPTH} levels deep", event.start_mark)
        if getattr(event, "tag", None) is not None:
            raise _error(f"a recipe has no tags such as {event.tag}", event.start_mark)
        self._depth += 1
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def get_single_node(self) -> yaml.Node | None:
        node: yaml.Node | None = super().get_single_node()
        if node is not None:
            _check_expanded_size(node)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _error("a key must be plain text", key.start_mark)
            if key.value in lines:
                raise _error(f"`{key.value}` is already given in line {lines[key.value]}", key.start_mark)
            lines[key.value] = key.start_mark.line + 1
            key.tag = "tag:yaml.org,2002:str"
        return super().construct_mapping(node, deep=True)


for _tag, _pattern, _starts in (
    ("null", r"~|null|", ["~", "n", ""]),
    ("bool", r"true|false", ["t", "f"]),
    ("int", r"[-+]?(0|[1-9][0-9_]*)", list("-+0123456789")),
    ("float", r"(?=.*[.eE])[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
):
    RecipeLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _starts)


def _check_expanded_size(root: yaml.Node) -> None:
    """Raise where a tree of nodes, with every alias expanded, has more than MAX_NODES or contains itself."""
    sizes: dict[int, int | None] = {}  # by identity of the node; None while its children are counted

    def size(node: yaml.Node) -> int:
        known = sizes.get(id(node), 0)
        if known is None:
            raise _error("an alias refers to a value that contains it", node.start_mark)
        if known:
            return known
        sizes[id(node)] = None
        total = 1
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        for child in children:
            total += sum(size(part) for part in (child if isinstance(child, tuple) else (child,)))
        if total > MAX_NODES:
            message = f"with its aliases expanded it has more than {MAX_NODES:,} keys and values"
            raise _error(message, node.start_mark)
        sizes[id(node)] = total
        return total

    size(root)


def _error(problem: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, mark)
