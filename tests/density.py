"""How dense the code is: tokens per code line by folder, long lines, the longest file, number of tests.

    make density

A code line holds at least one token that is neither comment nor docstring. Measured the same way: torchtitan
5.7, OLMo-core 6.2, litgpt 6.7, nanochat 8.2, big_vision 8.4. A report for readers: no test enforces a number.
"""

import ast
import io
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PACKAGES = ("modeling", "pretrain", "finetune", "launch")
LONG = 100  # columns
NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


class Density(NamedTuple):
    """Sums over a folder's files."""

    files: int
    code_lines: int
    tokens: int
    long_lines: int
    longest_file: int  # lines


def main() -> None:
    header = ("folder", "files", "code lines", "tokens/line", f"over {LONG}", "longest")
    print("{:<30}{:>7}{:>12}{:>13}{:>10}{:>9}".format(*header))
    packages = []
    for package in PACKAGES:
        files = list((ROOT / package).rglob("*.py"))
        packages += files
        _print_line(package, files)
        for folder in sorted({file.parent for file in files} - {ROOT / package}):
            _print_line(f"  {folder.relative_to(ROOT)}", list(folder.glob("*.py")))
    _print_line("the packages", packages)

    tests = list((ROOT / "tests").rglob("*.py"))
    _print_line("tests", tests)
    print(f"\n{sum(map(count_tests, tests))} test functions")


def density_of(files: list[Path]) -> Density:
    texts = [file.read_text(encoding="utf-8") for file in files]
    counts = [tokens_by_line(text) for text in texts]
    lines = [text.splitlines() for text in texts]
    return Density(
        files=len(files),
        code_lines=sum(len(count) for count in counts),
        tokens=sum(count.total() for count in counts),
        long_lines=sum(len(line) > LONG for text in lines for line in text),
        longest_file=max(len(text) for text in lines),
    )


def tokens_by_line(text: str) -> Counter[int]:
    """The number of tokens that begin on each code line."""
    docstrings = set(_docstring_lines(ast.parse(text)))
    counts: Counter[int] = Counter()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NO_CODE and token.start[0] not in docstrings:
            counts[token.start[0]] += 1
    return counts


def count_tests(file: Path) -> int:
    """Test functions; one with parameters counts once."""
    nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    return sum(isinstance(node, ast.FunctionDef) and node.name.startswith("test_") for node in nodes)


def _docstring_lines(tree: ast.Module) -> Iterator[int]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Constant):
            continue
        if isinstance(node.value.value, str):
            yield from range(node.lineno, (node.end_lineno or node.lineno) + 1)


def _print_line(name: str, files: list[Path]) -> None:
    density = density_of(files)
    per_line = density.tokens / max(density.code_lines, 1)
    print(
        f"{name:<30}{density.files:>7}{density.code_lines:>12,}{per_line:>13.1f}"
        f"{density.long_lines:>10}{density.longest_file:>9}"
    )


if __name__ == "__main__":
    main()
