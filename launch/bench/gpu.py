"""`make bench-gpu`: the table of goals on one GPU: six shapes next to the Hugging Face classes that a user
would take instead.

The presets below come in; one table, printed last, and the JSON and chart of --out come out. Each contender
is a process: one that hangs or fails loses its own row only. They build and compile in parallel and are timed
one at a time. `--tiny` runs the same code on small shapes on the CPU.
"""

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trifold.launch.bench import contenders, train
from trifold.launch.bench.contenders import Contender
from trifold.launch.bench.report import Row, show
from trifold.launch.bench.rows import micros
from trifold.launch.recipe.reader import CLONE, resolve
from trifold.launch.recipe.schema import PretrainRecipe
from trifold.launch.terminal import Terminal
from trifold.modeling.config import ModelConfig
from trifold.pretrain.distributed import RankInfo
from trifold.pretrain.monitor.metrics import peak_flops
from trifold.pretrain.storage.jsonl import append_line, read_lines

BERT = {"vocab_size": 30528, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
GPT2 = {"vocab_size": 50304, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
T5 = {
    "vocab_size": 32128,
    "d_model": 768,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 12,
    "num_heads": 12,
    "dropout_rate": 0.0,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "decoder_start_token_id": 1,
    "pad_token_id": 0,
}
SMALL = {  # the same classes for a rehearsal
    "BertForMaskedLM": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 128,
    },
    "GPT2LMHeadModel": {"n_embd": 64, "n_layer": 2, "n_head": 2},
    "T5ForConditionalGeneration": {"d_model": 64, "d_ff": 128, "num_layers": 2, "num_heads": 2, "d_kv": 32},
}


OURS, PLAIN_ROWS, FP8, PLAIN_LOOP = (
    "Trifold",
    "Trifold, plain rows",
    "Trifold, fp8 linears",
    "Trifold's model, plain torch loop",
)


@dataclass(frozen=True)
class Shape:
    """A row of the goals: our recipe, and whom it stands beside."""

    model: str
    objective: str
    row_length: int
    rows: int
    gib: int  # of device memory that ours takes
    goal: str
    peers: tuple[
        tuple[str, dict[str, Any] | None, bool, int], ...
    ]  # (class, its settings or None for our shape, compiled, gib)
    cuda_graphs: bool = False
    documents: int = 0
    fp8: bool = False
    plain_loop: bool = False  # ours without DeepSpeed too

    @property
    def contenders(self) -> list[str]:
        """Ours first."""
        padded = ", padded" if self.documents else ""
        peers = [
            f"{kind}, {'compiled' if compiled else 'eager'}{padded}" for kind, _, compiled, _ in self.peers
        ]
        more = {PLAIN_ROWS: self.documents > 0, FP8: self.fp8, PLAIN_LOOP: self.plain_loop}
        return [OURS, *(who for who, there in more.items() if there), *peers]

    def memory(self, i: int) -> int:
        """Of device memory that contender i takes, GiB."""
        ours = len(self.contenders) - len(self.peers)
        return self.gib if i < ours else self.peers[i - ours][3]


SHAPES = {
    "decoder 12x768, t1024": Shape(
        "decoder-110m",
        "causal",
        1024,
        32,
        14,
        "1.35 x Llama compiled, 1.2 x nanoGPT compiled",
        (
            ("LlamaForCausalLM", None, True, 19),
            ("GPT2LMHeadModel", GPT2, True, 19),
            ("LlamaForCausalLM", None, False, 31),
        ),
        cuda_graphs=True,
        plain_loop=True,
    ),
    "decoder 24x2048, t2048": Shape(
        "decoder-1.3b",
        "causal",
        2048,
        8,
        50,
        "1.25 x Llama compiled, 1.5 x in fp8",
        (("LlamaForCausalLM", None, True, 40), ("LlamaForCausalLM", None, False, 67)),
        fp8=True,
    ),
    "encoder base, t1024, 30 % masked": Shape(
        "encoder-base",
        "masked",
        1024,
        32,
        19,
        "2 x ModernBERT compiled",
        (("ModernBertForMaskedLM", None, True, 42), ("ModernBertForMaskedLM", None, False, 42)),
    ),
    "encoder base, t512": Shape(
        "encoder-base",
        "masked",
        512,
        64,
        19,
        "1.7 x BERT",
        (("BertForMaskedLM", BERT, True, 29), ("BertForMaskedLM", BERT, False, 24)),
    ),
    "encoder-decoder base, 512 in / 120 out": Shape(
        "encoder-decoder-base",
        "spans",
        512,
        64,
        21,
        "2 x T5 v1.1 compiled",
        (("T5ForConditionalGeneration", T5, True, 29), ("T5ForConditionalGeneration", T5, False, 54)),
        cuda_graphs=True,
    ),
    "packed documents, decoder 12x768, t1024": Shape(
        "decoder-110m",
        "causal",
        1024,
        32,
        14,
        "0.95 x plain rows, 1.5 x padded",
        (("LlamaForCausalLM", None, False, 34),),
        documents=4,
    ),
}
TINY = {
    "decoder-110m": "decoder-tiny",
    "decoder-1.3b": "decoder-tiny",
    "encoder-base": "encoder-tiny",
    "encoder-decoder-base": "encoder-decoder-tiny",
}


def bench(
    console: Terminal, *, only: Sequence[str], seconds: float, tiny: bool, steps: int, out: Path | None
) -> None:
    """All contenders, as many at a time as the device has memory for; ends after `seconds` at the latest, a
    few more for the table.
    """
    began, end = time.monotonic(), time.monotonic() + seconds
    chosen = {name: shape for name, shape in SHAPES.items() if name.startswith(tuple(only))}
    runs = [(name, i) for name, shape in chosen.items() for i in range(len(shape.contenders))]
    # What takes longest comes first; eager peers that no goal names come last, and are missed least.
    runs.sort(
        key=lambda run: (chosen[run[0]].contenders[run[1]].endswith("eager"), -chosen[run[0]].memory(run[1]))
    )
    gpu_memory = _GpuMemory(
        1 if tiny else 0.95 * torch.cuda.get_device_properties(0).total_memory / 2**30
    )  # allocators keep more than they hold

    def run(contender: tuple[str, int]) -> Row:
        name, i = contender
        who = SHAPES[name].contenders[i]
        with gpu_memory.taken(min(chosen[name].memory(i), gpu_memory.size)):
            row = _in_a_process(name, i, Path(folder), end - time.monotonic(), steps, tiny)
        note = row.get("note") or f"{row['tokens/s']:,.0f} tokens/s"
        console.print(f"{time.monotonic() - began:4.0f} s  {name}: {who}: {note}", highlight=False)
        return row

    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as folder, ThreadPoolExecutor(len(runs)) as pool:
        results = dict(zip(runs, pool.map(run, runs), strict=True))
    device = "a rehearsal on the CPU" if tiny else torch.cuda.get_device_name(0)
    title = f"one training step, {device}, torch {torch.__version__}"
    by_shape = {
        name: [results[name, i] for i in range(len(shape.contenders))] for name, shape in chosen.items()
    }
    show(console, title, [row for name, rows in by_shape.items() for row in _rows(name, rows)], out)


class _GpuMemory:
    """Gigabytes that threads take and give back; of those that wait, the first that fits goes on."""

    def __init__(self, size: float) -> None:
        self.size, self._free, self._changed = size, size, threading.Condition()
        self._waiting: dict[int, float] = {}  # of each thread

    @contextmanager
    def taken(self, amount: float) -> Iterator[None]:
        me = threading.get_ident()
        with self._changed:
            self._waiting[me] = amount
            self._changed.wait_for(
                lambda: next((who for who, wants in self._waiting.items() if wants <= self._free), None) == me
            )
            del self._waiting[me]
            self._free -= amount
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._free += amount
                self._changed.notify_all()


def measure(
    name: str, i: int, out: Path, *, steps: int, tiny: bool, rank_info: RankInfo, turn: Path | None = None
) -> None:
    """One contender of a shape, in this process; its row is written to `out`."""
    torch.set_float32_matmul_precision("high")
    shape, config = SHAPES[name], recipe_of(SHAPES[name], tiny)
    contender = contender_of(shape, i, config, rank_info, tiny)
    contenders.race([contender], rank_info, warmup=5, steps=steps, turn=turn)
    peak = (
        None if tiny else peak_flops(rank_info, torch.bfloat16)
    )  # of a CPU that emulates bf16 it says nothing
    append_line(out, train.result(contender, contender, peak))


def recipe_of(shape: Shape, tiny: bool) -> PretrainRecipe:
    """Ours, as a user would write it."""
    length, rows, model = (64, 2, TINY[shape.model]) if tiny else (shape.row_length, shape.rows, shape.model)
    return resolve(
        f"configs/model/{model}.yaml",
        [
            "run=bench",
            "data.sources=[{path: none}]",
            "data.heldout_fraction=0.01",
            f"data.row_length={length}",
            f"objective.kind={shape.objective}",
            "optimizer.lr=1e-4",
            "steps=1000",
            f"step_rows={rows}",
            f"micro_rows={rows}",
            "engine.precision=bf16",
            f"engine.compile={str(not tiny).lower()}",
            f"engine.cuda_graphs={str(shape.cuda_graphs and not tiny).lower()}",
        ],
    )


def contender_of(shape: Shape, i: int, config: PretrainRecipe, rank_info: RankInfo, tiny: bool) -> Contender:
    """The contender of that number: ours, on plain rows too where the shape is packed, in a plain loop, then
    the peers.
    """
    assert isinstance(config.model, ModelConfig)
    who, vocab, flops = (
        shape.contenders[i],
        config.model.vocab_size,
        train.flops_of_step(config, config.model),
    )
    documents = 0 if who == PLAIN_ROWS else shape.documents
    here = contenders.steps_of(micros(config, vocab, documents, train.DIFFERENT, rank_info.device), 1)
    if who in (OURS, PLAIN_ROWS, FP8):
        engine = config.engine.model_copy(update={"fp8": who == FP8})
        return contenders.ours(
            who, config.model_copy(update={"engine": engine}), config.model, here, rank_info, flops
        )
    if who == PLAIN_LOOP:
        return contenders.bare(who, config, config.model, here, rank_info, flops)
    kind, settings, compiled, _ = shape.peers[i - len(shape.contenders)]
    make = (
        contenders.same_shape(config.model)
        if settings is None
        else contenders.of_class(kind, settings | (SMALL[kind] if tiny else {}))
    )
    return contenders.stock(
        who,
        make,
        config,
        here,
        rank_info,
        flops,
        compiled=compiled and not tiny,
        padded=shape.documents > 0,
        vocab_size=(settings or {}).get("vocab_size", vocab),
    )


def _in_a_process(name: str, i: int, folder: Path, seconds: float, steps: int, tiny: bool) -> Row:
    who = {"": f"{name}: {SHAPES[name].contenders[i]}"}
    out = folder / f"{list(SHAPES).index(name)}-{i}.jsonl"
    command = [
        sys.executable,
        "-m",
        "trifold.launch.cli",
        "bench",
        "shape",
        name,
        str(i),
        str(out),
        str(steps),
        str(folder / "turn"),
    ]
    threads = str(max(1, (os.cpu_count() or 1) // 4))  # of the compiler: others compile at the same time
    try:
        done = subprocess.run(
            [*command, *(["--tiny"] if tiny else [])],
            cwd=CLONE,
            timeout=max(0.0, seconds),
            capture_output=True,
            text=True,
            env={**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": threads},
        )
    except subprocess.TimeoutExpired:
        return {**who, "note": "out of time"}
    if done.returncode:
        return {**who, "note": " ".join(done.stderr.strip().splitlines()[-1:])}
    (row,) = read_lines(out)
    return {**who, **{key: value for key, value in row.items() if key}}


def _rows(name: str, rows: list[Row]) -> list[Row]:
    """With how many times the tokens per second of each ours has."""
    ours = rows[0].get("tokens/s")
    for row in rows:
        if ours is not None and "tokens/s" in row:
            row["ours, times"] = ours / row["tokens/s"]
    return [{**rows[0], "goal": SHAPES[name].goal}, *rows[1:]]
