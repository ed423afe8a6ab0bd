"""The contenders of a benchmark: each does optimizer steps on the same micro-batches, one step per call of
`step`.

Ours is the product's Engine (DeepSpeed). The peers are Hugging Face classes of the same shape in the loop
that their Trainer runs (transformers/trainer.py: `training_step`): fp32 weights, bf16 autocast unless the
recipe is fp32, clipping, fused AdamW.
"""

import contextlib
import fcntl
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trifold.launch.bench.rows import Micro, Words, one_by_one, parts
from trifold.modeling.batch import IGNORE, Batch
from trifold.modeling.config import ModelConfig
from trifold.modeling.errors import UserError
from trifold.modeling.huggingface import express
from trifold.modeling.transformer import build
from trifold.pretrain.config.objectives import family_of, member_labels
from trifold.pretrain.config.pretraining import PretrainConfig
from trifold.pretrain.distributed import RankInfo
from trifold.pretrain.engine.engine import Engine, start_engine

SPECIAL = {"pad": Words.pad, "bos": Words.bos, "eos": Words.eos, "start": Words.bos}


@dataclass
class Contender:
    """`make` builds it, on the device, and returns its model and its step, whose number says which micros it
    reads. `tokens` and `targets` are those
    of one step, padding left out."""

    name: str
    make: Callable[[], tuple[nn.Module, Callable[[int], None]]]
    tokens: float
    targets: float
    flops: float  # of one step, by our formula: the same work for all
    model: nn.Module | None = None
    engine: Engine | None = None  # ours has one
    step: Callable[[int], None] | None = None
    seconds: list[float] = field(default_factory=list)  # of each timed step
    cpu_seconds: list[float] = field(default_factory=list)
    resident: int = 0  # bytes it holds between steps
    peak: int = 0  # bytes it held at most
    first_seconds: float = 0.0  # building it and its first step: compilation
    failed: str = ""


def steps_of(micros: Sequence[Micro], per_step: int) -> list[list[Micro]]:
    return [list(micros[i : i + per_step]) for i in range(0, len(micros) - per_step + 1, per_step)]


def ours(
    name: str,
    config: PretrainConfig,
    model_config: ModelConfig,
    steps: Sequence[Sequence[Micro]],
    rank_info: RankInfo,
    flops: float,
) -> Contender:
    """The product's engine, at this recipe's settings."""

    def make() -> tuple[nn.Module, Callable[[int], None]]:
        named, model = member_labels(config.objective), build(model_config, config.seed)
        engine = start_engine(
            lambda: model,
            model_config,
            config,
            [steps[0][0].batch],
            rank_info,
            len(named) if len(named) > 1 else 0,
        )
        racer.engine = engine

        def step(i: int) -> None:
            chosen = steps[i % len(steps)]
            engine.train_step(
                [m.batch for m in chosen], list(range(len(chosen))), sum(m.targets for m in chosen), 1.0
            )

        return model, step

    racer = Contender(name, make, *_counted(steps), flops)
    return racer


def bare(
    name: str,
    config: PretrainConfig,
    model_config: ModelConfig,
    steps: Sequence[Sequence[Micro]],
    rank_info: RankInfo,
    flops: float,
) -> Contender:
    """Our model in as plain a loop as bf16 weights with fp32 masters allow, without DeepSpeed: what the
    engine costs beside it.
    """

    def make() -> tuple[nn.Module, Callable[[int], None]]:
        model = build(model_config, config.seed).to(rank_info.device, torch.bfloat16)
        weights = list(model.parameters())
        masters = [weight.detach().float() for weight in weights]
        settings = config.optimizer
        optimizer = torch.optim.AdamW(
            masters, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
        )
        if config.engine.compile:
            model.compile(dynamic=False, mode="reduce-overhead" if config.engine.cuda_graphs else None)
        grads = [torch.empty_like(master) for master in masters]
        for master, grad in zip(masters, grads, strict=True):
            master.grad = grad

        def step(i: int) -> None:
            chosen = steps[i % len(steps)]
            for micro in chosen:
                if config.engine.cuda_graphs:
                    torch.compiler.cudagraph_mark_step_begin()
                (model(micro.batch.to(rank_info.device)).total / sum(m.targets for m in chosen)).backward()
            torch._foreach_copy_(grads, [weight.grad for weight in weights if weight.grad is not None])
            nn.utils.clip_grad_norm_(masters, settings.clip)
            optimizer.step()
            torch._foreach_copy_([weight.detach() for weight in weights], masters)
            model.zero_grad()

        return model, step

    return Contender(name, make, *_counted(steps), flops)


def stock(
    name: str,
    model: Callable[[], nn.Module],
    config: PretrainConfig,
    steps: Sequence[Sequence[Micro]],
    rank_info: RankInfo,
    flops: float,
    *,
    compiled: bool = False,
    padded: bool = False,
    vocab_size: int = 2**31,
) -> Contender:
    """A stock class in the Trainer's loop. `padded`: each document a row of its own, as many at a time as the
    recipe's micro batch has.

    `vocab_size`: of a class that knows fewer tokens than ours; it gets them modulo that.
    """
    shifts = family_of(config.objective) == "decoder"
    batches = [
        [
            part
            for m in chosen
            for part in (parts(one_by_one(m.batch), config.micro_rows) if padded else [m.batch])
        ]
        for chosen in steps
    ]
    inputs = [[stock_inputs(batch, shifts, vocab_size) for batch in chosen] for chosen in batches]
    low = config.engine.precision != "fp32"

    def make() -> tuple[nn.Module, Callable[[int], None]]:
        net = model().to(rank_info.device).train()
        optimizer = torch.optim.AdamW(
            net.parameters(),
            lr=config.optimizer.lr,
            betas=config.optimizer.betas,
            weight_decay=config.optimizer.weight_decay,
            fused=True,
        )
        run: Any = torch.compile(net) if compiled else net

        def step(i: int) -> None:
            for given in inputs[i % len(inputs)]:
                given = {key: value.to(rank_info.device, non_blocking=True) for key, value in given.items()}
                with torch.autocast(rank_info.device, torch.bfloat16, enabled=low):
                    loss = run(**given).loss
                (loss / len(inputs[i % len(inputs)])).backward()
            if config.optimizer.clip:
                nn.utils.clip_grad_norm_(net.parameters(), config.optimizer.clip)
            optimizer.step()
            optimizer.zero_grad()

        return net, step

    return Contender(name, make, *_counted(steps), flops)


def same_shape(model_config: ModelConfig) -> Callable[[], nn.Module]:
    """The stock class that publishes this model, with new weights."""
    architecture, hf = express(model_config, SPECIAL)
    return lambda: stock_class(architecture.stock_class, hf)


def of_class(name: str, settings: Mapping[str, Any]) -> Callable[[], nn.Module]:
    return lambda: stock_class(name, settings)


def stock_name(model_config: ModelConfig) -> str:
    return express(model_config, SPECIAL)[0].stock_class


def stock_class(name: str, settings: Mapping[str, Any]) -> nn.Module:
    """A class of transformers from its config's settings; with SDPA attention where it has that."""
    transformers = _transformers()
    kind = getattr(transformers, name)
    model_config = kind.config_class(
        **{key: value for key, value in settings.items() if key not in ("architectures", "model_type")}
    )
    model_config.use_cache = False
    torch.manual_seed(0)
    try:
        return kind._from_config(model_config, attn_implementation="sdpa")
    except ValueError:  # T5Gemma has none
        return kind._from_config(model_config, attn_implementation="eager")


def race(
    contenders: Sequence[Contender], rank_info: RankInfo, warmup: int, steps: int, turn: Path | None = None
) -> None:
    """Build, warm up and time them, in turn step by step, so that noise hits all alike. What a contender
    raises is its own result.

    `turn`: a file that processes lock while they warm up and are timed, so that one at a time does.
    """
    torch.set_num_threads(rank_info.threads)
    going = []
    for contender in contenders:
        try:
            began = time.perf_counter()
            with bytes_held(rank_info) as held:
                contender.model, contender.step = contender.make()
                contender.step(0)
                _wait(rank_info)
            contender.resident, contender.peak = held
            contender.first_seconds = time.perf_counter() - began
            going.append(contender)
        except Exception as error:  # a peer may lack a kernel, or memory: the others go on
            logging.getLogger(__name__).warning("%s failed", contender.name, exc_info=True)
            contender.failed = " ".join(f"{type(error).__name__}: {error}".split())[:120]
    with _alone(turn):
        for i, contender in itertools.product(range(1, warmup + 1 + steps), going):
            timed_step(contender, rank_info, i)
    for contender in going:
        del contender.seconds[:warmup], contender.cpu_seconds[:warmup]


@contextlib.contextmanager
def _alone(turn: Path | None) -> Iterator[None]:
    if turn is None:
        yield
        return
    with turn.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def timed_step(contender: Contender, rank_info: RankInfo, i: int) -> None:
    """Step i, and how long it took."""
    assert contender.step is not None
    _wait(rank_info)
    began, cpu = time.perf_counter(), time.process_time()
    contender.step(i)
    _wait(rank_info)
    contender.seconds.append(time.perf_counter() - began)
    contender.cpu_seconds.append(time.process_time() - cpu)


@contextlib.contextmanager
def bytes_held(rank_info: RankInfo) -> Iterator[list[int]]:
    """[bytes held afterwards, bytes held at most] beyond those held before, as torch's allocator counts
    them.
    """
    found = [0, 0]
    if rank_info.device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        yield found
        found[:] = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
        return
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        yield found
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    changes = [
        (e.start_ns(), e.nbytes()) for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"
    ]
    live = list(itertools.accumulate(size for _, size in sorted(changes)))
    found[:] = live[-1], max(live)


def _wait(rank_info: RankInfo) -> None:
    if rank_info.device == "cuda":
        torch.cuda.synchronize()


def _counted(steps: Sequence[Sequence[Micro]]) -> tuple[float, float]:
    """Tokens and targets of a step, on average."""
    return tuple(
        sum(getattr(m, what) for chosen in steps for m in chosen) / len(steps)
        for what in ("tokens", "targets")
    )


def stock_inputs(batch: Batch, shifts: bool, vocab_size: int = 2**31) -> dict[str, torch.Tensor]:
    """What a stock class takes; it `shifts` its labels itself where it is a decoder."""
    tokens, targets = (
        batch.tokens % vocab_size,
        batch.targets.where(batch.targets == IGNORE, batch.targets % vocab_size),
    )
    segments = batch.segments if batch.source is None else batch.source_segments
    mask = {} if segments is None else {"attention_mask": (segments > 0).long()}
    if batch.source is not None:
        return {
            "input_ids": batch.source % vocab_size,
            "decoder_input_ids": tokens,
            "labels": targets,
            **mask,
        }
    return {"input_ids": tokens, "labels": targets.roll(1, 1) if shifts else targets, **mask}


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise UserError(
            "the peers are stock classes of transformers: pip install 'trifold[publish]'"
        ) from None
    transformers.utils.logging.set_verbosity_error()
    return transformers
