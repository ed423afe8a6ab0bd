"""Stages: rows and micros are numbered over the whole run, and each stage goes on in the text where the one
before stopped.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.pretrain.data.small_corpus import FIRST, SmallCorpus, SmallVocabulary, recipe
from trifold.pretrain.config.pretraining import (
    CausalConfig,
    MaskedConfig,
    PretrainConfig,
    SpansConfig,
    StageConfig,
)
from trifold.pretrain.data import packing, row_order
from trifold.pretrain.data.loader import Loader
from trifold.pretrain.data.rows import Rows
from trifold.pretrain.data.stages import locate_step, resolve_stages

KINDS = pytest.mark.parametrize(
    "dials", [CausalConfig(), MaskedConfig(), SpansConfig()], ids=lambda dials: dials.kind
)


def staged(*stages: StageConfig, steps: int = 100, dials=None, **data) -> PretrainConfig:
    plain = recipe(dials or CausalConfig(), **data)
    return PretrainConfig.model_validate(
        plain.model_dump() | {"steps": steps, "stages": tuple(stage.model_dump() for stage in stages)}
    )


STAGE = st.builds(
    StageConfig,
    steps=st.integers(1, 6),
    row_length=st.none() | st.integers(2, 32),
    step_rows=st.none() | st.integers(4, 20),
    micro_rows=st.none() | st.integers(1, 4),
)


@given(st.lists(STAGE, max_size=4), st.integers(1, 6))
def test_every_row_and_micro_comes_once_and_in_order(stages: list[StageConfig], rest: int) -> None:
    config = staged(*stages, steps=sum(stage.steps for stage in stages) + rest)
    plan = resolve_stages(config)
    row = micro = step = 0
    for number, stage in enumerate([*stages, StageConfig(steps=rest)]):
        step_rows, micro_rows = stage.step_rows or config.step_rows, stage.micro_rows or config.micro_rows
        for _ in range(stage.steps):
            part, first_row, first_micro = locate_step(plan, step)
            assert (part.stage, first_row, first_micro) == (number, row, micro)
            assert (part.row_length, part.step_rows, part.micro_rows) == (
                stage.row_length or 32,
                step_rows,
                micro_rows,
            )
            rows = 0
            while rows < step_rows:
                rows += micro_rows
                micro += 1
            row, step = row + step_rows, step + 1
    assert locate_step(plan, config.steps)[1:] == (row, micro)  # the cursor of a finished run


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        (
            StageConfig(steps=3, row_length=33),
            r"stages\.1\.row_length \(33\) exceeds model\.max_positions \(32\)",
        ),
        (StageConfig(steps=3, step_rows=3), r"stages\.1 has micro_rows 4, which exceeds its step_rows 3"),
        (StageConfig(steps=98), r"the stages take 100 steps together, which leaves none of `steps` \(100\)"),
    ],
)
def test_stages_that_do_not_fit_are_refused_with_both_numbers(stage: StageConfig, said: str) -> None:
    staged(StageConfig(steps=2), StageConfig(steps=97))
    with pytest.raises(ValidationError, match=said):
        staged(StageConfig(steps=2), stage)


def test_each_source_of_a_mixture_goes_on_where_the_stages_before_stopped(monkeypatch) -> None:
    monkeypatch.setattr(packing, "BLOCK_TOKENS", 200)
    monkeypatch.setattr(row_order, "WINDOW", 3)
    lengths = np.random.default_rng(0).integers(1, 40, 200)
    corpora = [
        SmallCorpus(lengths, fingerprint="a"),
        SmallCorpus(lengths[:90], first=FIRST + 50_000, fingerprint="b"),
    ]
    config = recipe(CausalConfig(), weights=(3, 1))

    def rows(row_length: int, after: tuple[Rows, int] | None = None) -> Rows:
        return Rows.for_training(config, SmallVocabulary(), corpora, row_length=row_length, after=after)

    def following(numbers: range, rows: Rows) -> list[int]:
        """Of each source, the row after those that these are."""
        placed = [rows._locate(i) for i in numbers]
        return [1 + max(index for stream, index in placed if stream == wanted) for wanted in (0, 1)]

    for first_read, second_read in ((4, 5), (450, 1100), (2999, 7)):
        first = rows(12)
        second = rows(24, (first, first_read))
        third = rows(16, (second, first_read + second_read))
        for before, read, after in (
            (first, range(first_read), second),
            (second, range(first_read, first_read + second_read), third),
        ):
            assert after.first == read.stop
            begins = {}
            for i in range(read.stop, read.stop + 50):
                begins.setdefault(*after._locate(i))
            orders = [
                (stream.order, other.order)
                for stream, other in zip(after.streams, before.streams, strict=True)
            ]
            wanted = [
                mine.continue_index(other, index)
                for (mine, other), index in zip(orders, following(read, before), strict=True)
            ]
            assert [begins[0], begins[1]] == wanted
    assert (
        len(
            {
                rows(24).fingerprint,
                *(rows(24, (rows(n), read)).fingerprint for n in (12, 16) for read in (4, 5)),
            }
        )
        == 5
    )


@KINDS
def test_the_loader_changes_rows_and_steps_with_the_stage_at_any_world(dials) -> None:
    corpus = SmallCorpus([5, 20, 40, 100] * 10)
    config = staged(
        StageConfig(steps=2, row_length=16, step_rows=5, micro_rows=2),
        StageConfig(steps=1, step_rows=6),
        steps=5,
        dials=dials,
    )
    plan = resolve_stages(config)
    short = Rows.for_training(config, SmallVocabulary(), [corpus], row_length=16)
    long = Rows.for_training(config, SmallVocabulary(), [corpus], after=(short, 10))

    def steps(rank: int, world: int, start: int = 0):
        return list(
            Loader([short, long, long], plan, start=start, stop=5, rank=rank, world=world, prefetch=2)
        )

    alone = steps(0, 1)
    assert [(s.stage, s.first, s.last) for s in alone] == [
        (0, 0, 4),
        (0, 5, 9),
        (1, 10, 15),
        (2, 16, 23),
        (2, 24, 31),
    ]
    assert [s.micro_indices for s in alone] == [[0, 1, 2], [3, 4, 5], [6, 7], [8, 9], [10, 11]]
    sides = [{m.tokens.shape if m.source is None else m.source.shape for m in s.micros} for s in alone]
    assert sides == [{(2, 16)}] * 2 + [{(4, 32)}] * 3
    for source, s in zip([short, short, long, long, long], alone, strict=True):
        assert s.hash == sum(source.row(i).hash for i in range(s.first, s.last + 1)) % 2**63
    for step, ranks in enumerate(zip(steps(0, 2), steps(1, 2), strict=True)):
        assert sum(rank.hash for rank in ranks) % 2**63 == alone[step].hash
    assert [s.hash for s in steps(0, 1, start=1)] == [s.hash for s in alone[1:]]
