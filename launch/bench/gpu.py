"""`make bench-gpu`: the table of goals on one GPU, five shapes beside the stock classes that a user would take instead.

In: nothing but the presets below. Out: one table, printed last, and --out's JSON and chart. Each shape is a process of its own with a
share of the time: what hangs or fails costs its own rows and no others. `--tiny` runs the same code on small shapes on the CPU.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from launch.bench import contenders, train
from launch.bench.contenders import Contender
from launch.bench.report import Row, show
from launch.bench.rows import micros
from launch.config import CLONE, Recipe, resolve
from modeling.config import ModelConfig
from pretrain.engine import Place
from pretrain.metrics import append_line, peak_flops, read_lines

BERT = {"vocab_size": 30528, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
GPT2 = {"vocab_size": 50304, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
T5 = {
    "vocab_size": 32128, "d_model": 768, "d_kv": 64, "d_ff": 2048, "num_layers": 12, "num_heads": 12, "dropout_rate": 0.0,
    "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "decoder_start_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
SMALL = {  # the same classes for a rehearsal
    "BertForMaskedLM": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128},
    "GPT2LMHeadModel": {"n_embd": 64, "n_layer": 2, "n_head": 2},
    "T5ForConditionalGeneration": {"d_model": 64, "d_ff": 128, "num_layers": 2, "num_heads": 2, "d_kv": 32},
}


@dataclass(frozen=True)
class Shape:
    """A row of the goals: our recipe, and whom it stands beside."""

    model: str
    objective: str
    row_length: int
    rows: int
    seconds: int  # its share of the time
    goal: str
    peers: tuple[tuple[str, dict[str, Any] | None, bool], ...]  # (class, its settings or None for our shape, compiled)
    documents: int = 0
    more: tuple[str, ...] = field(default=())


SHAPES = {
    "decoder 12x768, t1024": Shape(
        "decoder-110m", "causal", 1024, 32, 80, "1.35 x Llama compiled, 1.2 x nanoGPT compiled",
        (("LlamaForCausalLM", None, True), ("GPT2LMHeadModel", GPT2, True), ("LlamaForCausalLM", None, False)),
    ),
    "decoder 24x2048, t2048": Shape(
        "decoder-1.3b", "causal", 2048, 8, 120, "1.25 x Llama compiled",
        (("LlamaForCausalLM", None, True), ("LlamaForCausalLM", None, False)),
    ),
    "encoder base, t1024, 30 % masked": Shape(
        "encoder-base", "masked", 1024, 32, 100, "2 x ModernBERT compiled",
        (("ModernBertForMaskedLM", None, True), ("ModernBertForMaskedLM", None, False)),
    ),
    "encoder base, t512": Shape(
        "encoder-base", "masked", 512, 64, 80, "1.7 x BERT", (("BertForMaskedLM", BERT, True), ("BertForMaskedLM", BERT, False))
    ),
    "encoder-decoder base, 512 in / 120 out": Shape(
        "encoder-decoder-base", "spans", 512, 64, 80, "2 x T5 v1.1 compiled",
        (("T5ForConditionalGeneration", T5, True), ("T5ForConditionalGeneration", T5, False)),
    ),
    "packed documents, decoder 12x768, t1024": Shape(
        "decoder-110m", "causal", 1024, 32, 60, "0.95 x plain rows, 1.5 x padded", (("LlamaForCausalLM", None, False),), documents=4
    ),
}  # fmt: skip
TINY = {
    "decoder-110m": "decoder-tiny",
    "decoder-1.3b": "decoder-tiny",
    "encoder-base": "encoder-tiny",
    "encoder-decoder-base": "encoder-decoder-tiny",
}


def bench(console: Console, *, only: Sequence[str], seconds: float, tiny: bool, steps: int, out: Path | None) -> None:
    """All shapes one after another; ends after `seconds` at the latest, a few more for the last table."""
    chosen = {name: shape for name, shape in SHAPES.items() if name.startswith(tuple(only))}
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as folder:
        for i, (name, shape) in enumerate(chosen.items()):
            left = sum(later.seconds for later in list(chosen.values())[i:])
            share = max(1.0, (end - time.monotonic()) * shape.seconds / left)
            _in_a_process(name, Path(folder) / f"{i}.jsonl", share, steps, tiny, console)
        rows = [row for i, name in enumerate(chosen) for row in _of(name, Path(folder) / f"{i}.jsonl")]
    show(
        console,
        f"one training step, {'a rehearsal on the CPU' if tiny else torch.cuda.get_device_name(0)}, torch {torch.__version__}",
        rows,
        out,
    )


def measure(name: str, out: Path, *, seconds: float, steps: int, tiny: bool, place: Place) -> None:
    """One shape in this process. Rows go to `out` when a contender has warmed up, and again when all are timed: the later one counts."""
    deadline = time.monotonic() + 0.7 * seconds  # nothing is begun later: it would not be ready in time
    torch.set_float32_matmul_precision("high")
    shape, recipe = SHAPES[name], recipe_of(SHAPES[name], tiny)
    racing, peak = field_of(shape, recipe, place, tiny), peak_flops(place, torch.bfloat16)

    def write(contender: Contender, note: str = "") -> None:
        append_line(out, {**train.result(contender, racing[0], peak), **({"note": note} if note else {})})

    contenders.race(racing, place, warmup=5, steps=steps, deadline=deadline, ready=lambda c: write(c, "warm-up alone"))
    for contender in racing:
        write(contender)


def recipe_of(shape: Shape, tiny: bool) -> Recipe:
    """Ours, as a user would write it."""
    length, rows, model = (64, 2, TINY[shape.model]) if tiny else (shape.row_length, shape.rows, shape.model)
    return resolve(
        f"configs/model/{model}.yaml",
        [
            "run=bench", "data.sources=[{path: none}]", "data.heldout_fraction=0.01", f"data.row_length={length}",
            f"objective.kind={shape.objective}", "optimizer.lr=1e-4", "steps=1000", f"step_rows={rows}", f"micro_rows={rows}",
            "engine.precision=bf16", f"engine.compile={str(not tiny).lower()}",
        ],
    )  # fmt: skip


def field_of(shape: Shape, recipe: Recipe, place: Place, tiny: bool) -> list[Contender]:
    """Ours, ours on plain rows where the shape is packed, and the peers."""
    assert isinstance(recipe.model, ModelConfig)
    vocab = recipe.model.vocab_size
    flops = train.flops_of_step(recipe, recipe.model)
    here = contenders.steps_of(micros(recipe, vocab, shape.documents, train.DIFFERENT, place.device), 1)
    racing = [contenders.ours("Trifold", recipe, recipe.model, here, place, flops)]
    if shape.documents:
        plain = contenders.steps_of(micros(recipe, vocab, 0, train.DIFFERENT, place.device), 1)
        racing.append(contenders.ours("Trifold, plain rows", recipe, recipe.model, plain, place, flops))
    for kind, settings, compiled in shape.peers:
        title = f"{kind}, {'compiled' if compiled else 'eager'}" + (", padded" if shape.documents else "")
        make = (
            contenders.same_shape(recipe.model) if settings is None else contenders.of_class(kind, settings | (SMALL[kind] if tiny else {}))
        )
        racing.append(
            contenders.stock(
                title,
                make,
                recipe,
                here,
                place,
                flops,
                compiled=compiled and not tiny,
                padded=shape.documents > 0,
                vocab_size=(settings or {}).get("vocab_size", vocab),
            )
        )
    return racing


def _in_a_process(name: str, out: Path, seconds: float, steps: int, tiny: bool, console: Console) -> None:
    began = time.monotonic()
    command = [sys.executable, "-m", "launch.cli", "bench", "shape", name, str(out), str(seconds), str(steps)]
    try:
        done = subprocess.run([*command, *(["--tiny"] if tiny else [])], cwd=CLONE, timeout=seconds, capture_output=True, text=True)
        said = "done" if done.returncode == 0 else f"failed: {done.stderr.strip().splitlines()[-1:]}"
    except subprocess.TimeoutExpired:
        said = "out of time"
    console.print(f"{name}: {said} after {time.monotonic() - began:.0f} s", highlight=False)


def _of(name: str, file: Path) -> list[Row]:
    last = {row[""]: row for row in read_lines(file)}
    rows = [{"": f"{name}: {who}", **{k: v for k, v in row.items() if k}} for who, row in last.items()]
    rows = rows or [{"": name, "note": "nothing was ready in time"}]
    return [{**rows[0], "goal": SHAPES[name].goal}, *rows[1:]]
