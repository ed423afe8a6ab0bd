"""How dense the code is: tokens per code line by folder, the share of long lines, the longest files.

    make density

A code line has at least one token that is no comment and no docstring. Fields for comparison (measured the same
way): torchtitan 5.7, OLMo-core 6.2, litgpt 6.7, nanochat 8.2, big_vision 8.4.
"""

import ast
import io
import tokenize
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("modeling", "pretrain", "finetune", "launch")
NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
    tokenize.ENCODING,
}


def tokens_by_line(text: str) -> Counter[int]:
    """The number of tokens that begin on each code line."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            docstrings.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    counts: Counter[int] = Counter()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NO_CODE and token.start[0] not in docstrings:
            counts[token.start[0]] += 1
    return counts


def report(name: str, files: list[Path]) -> None:
    texts = [file.read_text(encoding="utf-8") for file in files]
    counts = [tokens_by_line(text) for text in texts]
    lines, tokens = sum(map(len, counts)), sum(count.total() for count in counts)
    long = sum(len(line) > 100 for text in texts for line in text.splitlines())
    longest = max(len(text.splitlines()) for text in texts)
    print(f"{name:<28}{len(files):>6}{lines:>12,}{tokens / max(lines, 1):>13.1f}{long:>10}{longest:>9}")


def main() -> None:
    print(f"{'folder':<28}{'files':>6}{'code lines':>12}{'tokens/line':>13}{'over 100':>10}{'longest':>9}")
    everything: list[Path] = []
    for package in PACKAGES:
        files = sorted((ROOT / package).rglob("*.py"))
        everything += files
        report(package, files)
        for folder in sorted({file.parent for file in files} - {ROOT / package}):
            report(f"  {folder.relative_to(ROOT)}", sorted(folder.glob("*.py")))
    report("the packages", everything)
    report("tests", sorted((ROOT / "tests").rglob("*.py")))


if __name__ == "__main__":
    main()
