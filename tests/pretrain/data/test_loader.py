import threading
import time
from contextlib import closing
from typing import Any

import pytest
import torch

from tests.pretrain.data.small_corpus import SmallCorpus, SmallVocabulary, recipe
from trifold.modeling.batch import IGNORE
from trifold.pretrain.config.pretraining import CausalConfig, MaskedConfig, SpansConfig
from trifold.pretrain.data.loader import Loader, StepRows
from trifold.pretrain.data.rows import Rows
from trifold.pretrain.data.stages import ResolvedStage

KINDS = pytest.mark.parametrize(
    "dials", [CausalConfig(), MaskedConfig(), SpansConfig()], ids=lambda dials: dials.kind
)


def rows_of(dials) -> Rows:
    return Rows.for_training(recipe(dials), SmallVocabulary(), [SmallCorpus([5, 20, 40, 100] * 10)])


def loader_of(rows: Rows, rank: int = 0, world: int = 1, **choices) -> Loader:
    settings = {"start": 0, "stop": 4, "prefetch": 2} | choices
    return Loader(
        [rows], [ResolvedStage(row_length=32, step_rows=10, micro_rows=3)], rank=rank, world=world, **settings
    )


def loading() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "loader"]


@KINDS
@pytest.mark.parametrize("world", [2, 3, 5])
def test_every_world_sees_the_same_rows_and_the_same_hash(dials, world):
    alone = list(loader_of(rows_of(dials)))
    shares = [list(loader_of(rows_of(dials), rank, world)) for rank in range(world)]
    for step, whole in enumerate(alone):
        ranks: list[StepRows] = [share[step] for share in shares]
        assert sum(rank.hash for rank in ranks) % 2**63 == whole.hash
        assert (
            sum(rank.count for rank in ranks)
            == whole.count
            == sum(int((m.targets != IGNORE).sum()) for m in whole.micros)
        )
        sides = [side for m in whole.micros for side in (m.segments, m.source_segments) if side is not None]
        assert (
            sum(rank.tokens for rank in ranks) == whole.tokens == sum(int((side > 0).sum()) for side in sides)
        )
        assert {(rank.first, rank.last) for rank in ranks} == {(10 * step, 10 * step + 9)}
        assert {len(rank.micros) for rank in ranks} == {-(-4 // world)}
        by_index = {
            index: micro
            for rank in ranks
            for index, micro in zip(rank.micro_indices, rank.micros, strict=True)
        }
        for index, micro in zip(whole.micro_indices, whole.micros, strict=True):
            assert torch.equal(by_index[index].tokens, micro.tokens) and torch.equal(
                by_index[index].targets, micro.targets
            )
        fillers = [
            m
            for rank in ranks
            for m, i in zip(rank.micros, rank.micro_indices, strict=True)
            if i not in whole.micro_indices
        ]
        assert all((m.segments == 0).all() and (m.targets == IGNORE).all() for m in fillers)
        assert all(m.tokens.shape == whole.micros[0].tokens.shape for m in fillers)


def test_micro_indices_number_the_micros_of_the_whole_run():
    assert [i for step in loader_of(rows_of(CausalConfig())) for i in step.micro_indices] == list(range(16))


@KINDS
def test_a_resumed_loader_goes_on_with_the_same_steps(dials):
    straight = [
        (s.step, s.first, s.last, s.micro_indices, s.count, s.hash) for s in loader_of(rows_of(dials))
    ]
    resumed = [
        (s.step, s.first, s.last, s.micro_indices, s.count, s.hash)
        for s in loader_of(rows_of(dials), start=2)
    ]
    assert resumed == straight[2:]


def test_skipped_rows_are_never_loaded_and_the_next_ones_move_up():
    rows = rows_of(CausalConfig())
    steps = list(loader_of(rows, skips=[(20, 29), (5, 6)]))
    wanted = [i for i in range(60) if i not in range(20, 30) and i not in (5, 6)][:40]
    assert [(s.first, s.last) for s in steps] == [(wanted[10 * k], wanted[10 * k + 9]) for k in range(4)]
    assert [s.hash for s in steps] == [
        sum(rows.row(i).hash for i in wanted[10 * k : 10 * k + 10]) % 2**63 for k in range(4)
    ]


def test_an_error_while_loading_reaches_the_consumer(monkeypatch):
    rows = rows_of(CausalConfig())
    whole = rows.rows
    monkeypatch.setattr(rows, "rows", lambda numbers: whole(numbers) if max(numbers) < 20 else 1 / 0)
    steps = iter(loader_of(rows))
    assert [next(steps).step, next(steps).step] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(steps)
    assert loading() == []


def test_the_thread_ends_when_the_consumer_stops_early():
    steps: Any = iter(loader_of(rows_of(CausalConfig()), stop=1000))
    with closing(steps):
        next(steps)
        assert len(loading()) == 1
    assert loading() == []
    for _ in loader_of(rows_of(CausalConfig()), stop=1000):
        break
    assert loading() == []


def test_the_thread_works_ahead_but_not_further_than_told(monkeypatch):
    rows, made = rows_of(CausalConfig()), []
    whole = Loader.share
    monkeypatch.setattr(Loader, "share", lambda self, step: made.append(step) or whole(self, step))
    steps: Any = iter(loader_of(rows, stop=1000, prefetch=3))
    with closing(steps):
        next(steps)
        deadline = time.monotonic() + 20
        while len(made) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
        assert made == [0, 1, 2, 3, 4]  # one taken, three waiting, one in hand
