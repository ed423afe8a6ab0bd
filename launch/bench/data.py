"""`trifold bench data`: tokens per second of one core, from text to micro-batches: tokenizing, and the rows
of each objective.

Process time of one thread is measured, so that a busy machine does not matter. Tokenizing is compared with
SentencePiece's own speed on the same text.
"""

import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import sentencepiece

from trifold.launch.bench.report import Row, machine, show
from trifold.launch.bench.rows import synthetic
from trifold.launch.recipe.schema import PretrainRecipe
from trifold.launch.terminal import Terminal
from trifold.modeling.errors import UserError
from trifold.pretrain.config.objectives import (
    AnyObjective,
    CausalConfig,
    ContinuationConfig,
    FimConfig,
    InfillingConfig,
    MaskedConfig,
    MixtureConfig,
    PrefixConfig,
    SpansConfig,
)
from trifold.pretrain.data.corpus import documents
from trifold.pretrain.data.loader import Loader
from trifold.pretrain.data.objectives import OBJECTIVES as OBJECTIVE_CLASSES
from trifold.pretrain.data.prepare import batched
from trifold.pretrain.data.stages import resolve_stages
from trifold.pretrain.data.tokenizer.tokenizer import Tokenizer
from trifold.pretrain.run import make_tokenizer

OBJECTIVES: dict[str, AnyObjective] = {
    "causal": CausalConfig(),
    "prefix": PrefixConfig(),
    "fim": FimConfig(),
    "masked": MaskedConfig(),
    "masked, whole words": MaskedConfig(whole_words=True),
    "spans": SpansConfig(),
    "continuation": ContinuationConfig(),
    "infilling": InfillingConfig(),
    "UL2's mixture": MixtureConfig(parts=(
        SpansConfig(mode="R"), SpansConfig(mode="R", mean_length=8), ContinuationConfig(mode="S"),
        SpansConfig(mode="X", density=0.5), SpansConfig(mode="X", density=0.5, mean_length=8),
        SpansConfig(mode="X", mean_length=64), SpansConfig(mode="X", density=0.5, mean_length=64),
    )),  # configs/pretrain/books-ul2.yaml
}  # fmt: skip
assert {dials.kind for dials in OBJECTIVES.values()} == {*OBJECTIVE_CLASSES, "mixture"}
VOCABULARY, STEPS, ROUNDS = 32_000, 20, 5


def bench(
    config: PretrainRecipe, console: Terminal, *, megabytes: int, documents_per_row: int, out: Path | None
) -> None:
    """Measure and show."""
    rows = [
        *tokenizing(config, megabytes),
        *(making(config, name, dials, documents_per_row) for name, dials in OBJECTIVES.items()),
    ]
    show(
        console,
        f"{config.run}: text and rows of {config.data.row_length}, one core's own time\n{machine('cpu', 1)}",
        rows,
        out,
    )


def tokenizing(config: PretrainRecipe, megabytes: int) -> list[Row]:
    """Ours on words never seen and on words seen before, and SentencePiece by the same model."""
    tokenizer = make_tokenizer(config, lambda what, done: None)
    texts = _sample(config, megabytes * 1_000_000)
    folder = Path(config.run) / "tokenizer"
    again = Tokenizer.open(folder)

    def ours() -> int:
        return sum(len(ids) for batch in batched(iter(texts)) for ids in again.encode_batch(batch))

    (cold, number), (warm, _) = _timed(ours), _timed(ours)
    rows: list[Row] = [_row("tokenize, words new", number, cold), _row("tokenize, words known", number, warm)]
    if (folder / "tokenizer.model").exists():
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        theirs, _ = _timed(lambda: sum(len(pieces.encode(text)) for text in texts))
        rows = [
            {**row, "x SentencePiece": theirs / seconds}
            for row, seconds in zip(rows, (cold, warm), strict=True)
        ]
        rows.append(_row("SentencePiece itself", number, theirs))
    assert tokenizer.fingerprint == again.fingerprint
    return rows


def making(config: PretrainRecipe, name: str, dials: AnyObjective, documents_per_row: int) -> Row:
    """An epoch's steps, packing included: rows packed, drawn, hashed and stacked, as the loader's thread does
    it. The best of ROUNDS: what else the machine does slows even a thread's own time.
    """
    asked = config.model_copy(update={"objective": dials, "stages": ()})

    def once() -> tuple[float, int]:
        source = synthetic(
            asked, VOCABULARY, documents_per_row, STEPS * config.step_rows
        )  # has packed nothing yet
        steps = source.num_rows // config.step_rows
        loader = Loader([source], resolve_stages(asked), start=0, stop=steps, rank=0, world=1, prefetch=1)
        return _timed(lambda: sum(loader.share(step).tokens for step in range(steps)))

    seconds, tokens = min(once() for _ in range(ROUNDS))
    return _row(f"rows: {name}", tokens, seconds)


def _row(name: str, tokens: int, seconds: float) -> Row:
    return {"": name, "tokens/s": tokens / seconds, "tokens": tokens, "CPU s": seconds}


def _timed(work: Callable[[], int]) -> tuple[float, int]:
    began = time.process_time()
    done = work()
    return time.process_time() - began, done


def _sample(config: PretrainRecipe, size: int) -> Sequence[str]:
    """The first texts of the recipe's first source."""
    texts, held = [], 0
    for text in islice(documents(config.data.sources[0]), 1_000_000):
        texts.append(text)
        held += len(text)
        if held >= size:
            return texts
    if not texts:
        raise UserError(f"the first source of {config.run} has no text to measure with")
    return texts
