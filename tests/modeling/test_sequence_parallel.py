"""Rows that ranks share, against the same rows whole: losses, each position's loss, and gradients, for every
family and way of position.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.modeling.families import CONFIGS, documents, packed
from trifold.modeling.activation_memory import measure_micro_memory
from trifold.modeling.batch import Batch
from trifold.modeling.sequence_parallel import AllToAll, SequenceShard
from trifold.modeling.transformer import Transformer, build


def ranks(size: int) -> list[SequenceShard]:
    """As many ranks, each to be used in a thread of its own: on the CPU a backward runs in the thread that
    asked for it.
    """
    barrier, board = threading.Barrier(size), [torch.empty(0)] * size

    def swap_of(rank: int) -> AllToAll:
        def swap(x: Tensor) -> Tensor:
            board[rank] = x.detach()
            barrier.wait(20)
            mine = torch.stack([sent[rank] for sent in board])
            barrier.wait(20)
            return mine

        return swap

    return [SequenceShard(rank, size, swap_of(rank)) for rank in range(size)]


def on_all(size: int, work: Callable[[SequenceShard], Any]) -> list[Any]:
    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(work, ranks(size)))


def rows(name: str) -> Batch:
    """Two packed rows of 32 positions whose documents do not end where slices do; of an encoder with picks at
    uneven places.
    """
    config = CONFIGS[name]
    created = [packed(documents(config, [(3, 4), (11, 9), (13, 6)], seed), 32, 24) for seed in (1, 2)]
    columns: Any = {
        name: None if value is None else torch.cat([value, getattr(created[1], name)])
        for name, value in vars(created[0]).items()
    }
    both = Batch(**columns)
    picked = torch.tensor(
        [[0, 1, 2, 3, 4, 5, 6, 7, 8, 20, -1, -1], [9, 15, 16, 17, 26, -1, -1, -1, -1, -1, -1, -1]]
    )
    return replace(both, picked=picked if name == "modernbert" else None)


def result(model: Transformer, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The sum of the losses, each loss, and all gradients."""
    with torch.no_grad():
        each = model(batch).nll
    loss = model(batch).total
    loss.backward()
    return loss.detach(), each, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_slices_have_the_losses_and_gradients_of_whole_rows(name: str, packs: bool) -> None:
    config = CONFIGS[name]
    batch = rows(name) if packs else replace(rows(name), segments=None, source_segments=None)
    whole_loss, whole_each, whole_grads = result(build(config, 0), batch)

    def work(shared: SequenceShard) -> Any:
        model = build(config, 0)
        model.recompute(packs)
        model.set_sequence_shard(shared)
        return result(model, shared.local(batch))

    losses, each, grads = zip(*on_all(config.num_kv_heads, work), strict=True)
    torch.testing.assert_close(sum(losses), whole_loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.cat(each, dim=1), whole_each, rtol=1e-4, atol=1e-5)
    largest = max(float(grad.abs().max()) for grad in whole_grads.values())
    for key, expected in whole_grads.items():
        torch.testing.assert_close(sum(grad[key] for grad in grads), expected, rtol=1e-3, atol=2e-6 * largest)


def test_picks_of_a_slice_keep_their_targets_and_take_no_more_room_than_it_has() -> None:
    batch = rows("modernbert")
    assert batch.picked is not None
    taken: list[tuple[int, int]] = []
    for shared in ranks(4):
        own = shared.local(batch)
        assert own.picked is not None and own.picked.shape == (2, 8)
        taken += [
            (row, 8 * shared.index + at) for row in (0, 1) for at in own.picked[row].tolist() if at >= 0
        ]
    assert sorted(taken) == [(row, at) for row in (0, 1) for at in batch.picked[row].tolist() if at >= 0]


@pytest.mark.parametrize("name", ["llama", pytest.param("t5gemma", marks=pytest.mark.proof)])
def test_activations_shrink_by_the_ranks_and_what_is_sent_is_counted(name: str) -> None:
    config = CONFIGS[name].model_copy(update={"num_kv_heads": 4, "max_positions": 512, "local_window": 0})
    created = packed(documents(config, [(500, 500)]), 512, 512)
    batch = replace(
        created, segments=None, source_segments=None
    )  # without masks, which the CPU makes for whole rows
    sent: list[int] = []

    def work(shared: SequenceShard) -> None:
        def counting(x: Tensor) -> Tensor:
            sent.append(x.nbytes // 2)
            return shared.swap(x)

        model = build(config, 0)
        model.set_sequence_shard(replace(shared, swap=counting))
        model(shared.local(batch)).total.backward()

    on_all(2, work)
    one, two = (measure_micro_memory(config, batch, "fp32", False, "cpu", sharing) for sharing in (1, 2))
    assert one.sent == 0 and 2 * two.sent == sum(sent)
    # What attention found is kept twice: as its own backward and as that of the next map read it.
    assert two.kept < 0.54 * one.kept and two.peak < 0.56 * one.peak
