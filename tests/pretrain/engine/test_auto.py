"""`auto` in the engine settings: what each device does best, and the same answer on all ranks."""

import pytest
import torch

from tests.pretrain.engine.small_engine import recipe, rows
from tests.processes import run_processes
from tests.recipes import model_config
from trifold.modeling.transformer import build
from trifold.pretrain.distributed import RankInfo
from trifold.pretrain.engine.auto import resolve_precision
from trifold.pretrain.engine.engine import start_engine


@pytest.mark.parametrize(
    ("amx", "avx512", "chosen"), [(True, False, "bf16"), (False, True, "bf16"), (False, False, "fp32")]
)
def test_a_cpu_trains_in_bf16_only_where_it_has_instructions_for_it(amx, avx512, chosen, monkeypatch):
    # Mocked, because a machine has one CPU.
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    assert resolve_precision(recipe(precision="auto"), "cpu").engine.precision == chosen
    assert resolve_precision(recipe(precision="autocast"), "cpu").engine.precision == "autocast"


def _on_unlike_cpus(rank_info: RankInfo, fast: list[bool]) -> tuple[str, bool, float]:
    torch.cpu._is_amx_tile_supported = lambda: fast[rank_info.rank]
    torch.cpu._is_avx512_bf16_supported = lambda: False
    config = recipe(precision="auto", recompute=not fast[rank_info.rank])
    engine = start_engine(
        lambda: build(model_config(config), seed=0), model_config(config), config, [rows(0)], rank_info
    )
    return engine.precision, engine.recompute, engine.train_step([rows(0)], [0], 100, 1.0).loss


@pytest.mark.parametrize(("fast", "agreed"), [([True, False], "fp32"), ([True, True], "bf16")])
def test_ranks_on_unlike_cpus_train_in_one_precision_and_recompute_where_one_needs_it(fast, agreed):
    first, second = run_processes(2, _on_unlike_cpus, fast)
    assert first == second
    assert first[:2] == (agreed, not all(fast))
