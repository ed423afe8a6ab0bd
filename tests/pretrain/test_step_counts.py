"""A step waits for the device a fixed number of times, however many micro batches it has."""

from launch.bench.rows import micros
from launch.config import resolve
from modeling.transformer import build
from pretrain.engine import Engine, Place
from tests.modeling.test_guards import Calls
from tests.processes import run_processes

WAITS = {"fp32": 4, "bf16": 3}  # recorded: what reads a number off the device in one step, DeepSpeed's reads included


def _waits(place: Place) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for precision in WAITS:
        recipe = resolve("configs/demo/decoder.yaml", ["micro_rows=1", "step_rows=4", f"engine.precision={precision}"])
        engine = Engine(build(recipe.model, 0), recipe, place)
        batches = [micro.batch for micro in micros(recipe, recipe.model.vocab_size, 3, 4, "cpu")]
        for number in (1, 1, 4):  # the first makes what later ones keep
            with Calls() as calls:
                engine.train_step(batches[:number], list(range(number)), 100, 1.0)
            found.setdefault(precision, []).append(calls.of["_local_scalar_dense"])
    return found


def test_a_step_waits_as_often_as_was_recorded_whatever_its_micro_batches() -> None:
    for precision, (_, one, four) in run_processes(1, _waits)[0].items():
        print(precision, one, four)
        assert one == four <= WAITS[precision]
