"""The format of checkpoints: one that was saved by this format's first version still loads, and a change of
what is saved is noticed.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.pretrain.checkpoint.builders import Events, newest_step, tensors_of
from tests.pretrain.checkpoint.make_fixture import FIXTURES, make_run
from trifold.modeling.errors import UserError
from trifold.pretrain.checkpoint.checkpoint import newest_verified, open_checkpoint, verify
from trifold.pretrain.checkpoint.format import (
    COMMIT,
    FORMAT,
    OtherFormat,
    ParameterSlices,
    seal,
    unseal,
)
from trifold.pretrain.checkpoint.lease import take_generation, valid_folders
from trifold.pretrain.storage.disk import DiskPath

CHANGED = (
    "what a checkpoint holds has changed: raise FORMAT in pretrain/checkpoint/format.py and run"
    " python -m tests.pretrain.checkpoint.make_fixture"
)
OPEN_KEYS = ("versions", "files", "config", "model", "slices", "scores")  # whose own keys differ


@pytest.fixture
def fixture(tmp_path: Path) -> DiskPath:
    shutil.copytree(FIXTURES / f"format-{FORMAT}", tmp_path / "run")
    return DiskPath(tmp_path / "run")


def structure(value: Any) -> Any:
    """The keys and types of a JSON value."""
    if isinstance(value, dict):
        return {key: None if key in OPEN_KEYS else structure(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [structure(value[0])] if value else []
    return type(value).__name__


def files_of(folder: Path) -> dict[str, Any]:
    """Every file of a run by name, JSON files by their structure."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file():
            is_json = path.suffix == ".json" or "lease" in name
            found[name] = structure(json.loads(path.read_bytes())) if is_json else path.stat().st_size
    return found


def test_a_checkpoint_of_this_format_that_was_saved_long_ago_loads(fixture: DiskPath) -> None:
    assert newest_step(fixture) == 30
    assert [folder.name for folder in valid_folders(fixture)] == [
        "step-00000010-g0001",
        "step-00000020-g0001",
        "step-00000030-g0002",
    ]
    for folder, step in zip(valid_folders(fixture), (10, 20, 30), strict=True):
        verify(folder)
        checkpoint = open_checkpoint(folder)
        for name, tensor in tensors_of(step).items():
            assert torch.equal(checkpoint.full(name), tensor)
    assert take_generation(fixture).generation == 3


def test_what_is_saved_today_has_the_structure_of_the_fixture(fixture: DiskPath, tmp_path: Path) -> None:
    assert files_of(make_run(tmp_path / "today").path) == files_of(fixture.path), CHANGED


@pytest.mark.parametrize(("number", "words"), [(2, "has format 2"), (None, "has no format number")])
def test_a_checkpoint_of_another_format_is_rejected_by_name_and_is_not_passed_over(
    fixture: DiskPath, number: int | None, words: str
) -> None:
    marker = valid_folders(fixture)[-1] / COMMIT
    record = unseal(marker.read_bytes())
    assert record is not None
    del record["format"]
    marker.replace(seal({"format": number, **record} if number else record))
    message = (
        rf"step-00000030-g0002 {words}, and this version of Trifold reads format 1: continue the run with"
    )
    with pytest.raises(OtherFormat, match=message):
        newest_verified(fixture, Events())
    with pytest.raises(UserError, match=message):
        take_generation(fixture)


def test_ranges_of_a_parameter_are_found_in_the_files_of_several_ranks() -> None:
    slices = ParameterSlices(shape=[10], keys=["fp32"], starts=[0, 0, 6, 6], ranks=[3, 0, 2, 1])
    assert list(slices.ranges(4, 8)) == [(0, 4, 6), (1, 0, 2)]
    assert list(slices.ranges(0, 10)) == [(0, 0, 6), (1, 0, 4)]
    assert list(slices.ranges(6, 7)) == [(1, 0, 1)]
    assert [piece[1:] for piece in slices.ranges(5, 5)] == [(0, 0)]
    assert [piece[1:] for piece in slices.ranges(10, 10)] == [(0, 0)]
