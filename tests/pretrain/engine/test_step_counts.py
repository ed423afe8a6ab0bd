"""A step's counts that no machine changes: how often it waits for the device, how many operations it runs,
how often it allocates.
"""

from functools import partial

import torch
from torch._dynamo.testing import CompileCounter

from tests.modeling.operation_counts import Calls
from tests.processes import run_processes
from tests.recipes import model_config
from trifold.launch.bench.rows import micros
from trifold.launch.recipe.reader import resolve
from trifold.modeling.transformer import build
from trifold.pretrain.distributed import RankInfo
from trifold.pretrain.engine.engine import Engine

WAITS = {
    "fp32": 0,
    "bf16": 0,
}  # recorded: what reads a number off the device in one step, DeepSpeed's reads included
OPERATIONS = {
    "fp32": 945,
    "bf16": 1175,
}  # of one step of one micro batch, DeepSpeed's and the optimizer's included
ALLOCATIONS = {"fp32": 532, "bf16": 756}  # of memory, in the same


def _counts(rank_info: RankInfo) -> dict[str, list[tuple[int, int, int]]]:
    found: dict[str, list[tuple[int, int, int]]] = {}
    for precision in WAITS:
        recipe = resolve(
            "configs/demo/decoder.yaml", ["micro_rows=1", "step_rows=4", f"engine.precision={precision}"]
        )
        engine = Engine(build(model_config(recipe), 0), recipe.engine, recipe.optimizer, rank_info)
        batches = [micro.batch for micro in micros(recipe, recipe.model.vocab_size, 3, 4, "cpu")]
        synchronized = _synchronizations()
        for number in (1, 1, 4, 1):  # the first makes what later ones keep
            with (
                torch.profiler.profile(
                    activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
                ) as profile,
                Calls() as calls,
            ):
                engine.train_step(batches[:number], list(range(number)), 100, 1.0)
            assert profile.profiler is not None and profile.profiler.kineto_results is not None
            allocations = sum(
                e.name() == "[memory]" and e.nbytes() > 0 for e in profile.profiler.kineto_results.events()
            )
            found.setdefault(precision, []).append(
                (calls.of["_local_scalar_dense"], calls.of.total(), allocations)
            )
        assert not synchronized, "DeepSpeed waits for the whole device"
    return found


def _synchronizations() -> list[None]:
    """Grows with every wait of DeepSpeed's for all that the device has to do."""
    from deepspeed.accelerator import get_accelerator

    found: list[None] = []
    type(get_accelerator()).synchronize = lambda *_: found.append(None)
    return found


def _graphs(rank_info: RankInfo) -> list[tuple[int, float]]:
    """Graphs compiled so far and the loss after steps on rows of different content, and after an evaluation
    between them.
    """
    graphs = CompileCounter()
    torch.compile = partial(torch.compile, backend=graphs)
    recipe = resolve(
        "configs/demo/decoder.yaml",
        ["micro_rows=1", "step_rows=1", "engine.compile=true", "engine.precision=fp32"],
    )
    engine = Engine(build(model_config(recipe), 0), recipe.engine, recipe.optimizer, rank_info)
    batches = [micro.batch for micro in micros(recipe, recipe.model.vocab_size, 3, 3, "cpu")]
    found = []
    for batch in batches:
        found.append((graphs.frame_count, engine.train_step([batch], [0], 100, 1.0).loss))
        engine.evaluate(batch)
    return [*found, (graphs.frame_count, 0.0)]


def test_training_is_compiled_once_and_evaluating_is_not() -> None:
    found = run_processes(1, _graphs)[0]
    assert [graphs for graphs, _ in found] == [0, 1, 1, 1]


def test_a_step_waits_computes_and_allocates_as_often_as_was_recorded() -> None:
    for precision, (_, one, four, _) in run_processes(1, _counts)[0].items():
        print(precision, one, four)
        assert one[0] == four[0] <= WAITS[precision], "more micro batches, more waits"
        assert one[1] <= OPERATIONS[precision] and one[2] <= ALLOCATIONS[precision]
