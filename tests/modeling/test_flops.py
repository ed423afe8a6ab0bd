"""Closed forms against built models, and against figures worked out elsewhere."""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml

from tests.modeling.families import CONFIGS, RECURRENT
from tests.paths import ROOT
from trifold.modeling.config import ModelConfig
from trifold.modeling.flops import num_parameters, train_flops_per_row
from trifold.modeling.transformer import Transformer, build

PRESETS = sorted((ROOT / "configs/model").glob("*.yaml"))


def _preset(path: Path) -> ModelConfig:
    values = yaml.safe_load(path.read_text())
    assert list(values) == ["model"]
    return ModelConfig.model_validate_json(json.dumps(values["model"]))


def _variants(config: ModelConfig) -> list[ModelConfig]:
    updates: list[dict[str, object]] = [
        {},
        {"tie_embeddings": False},
        {"bias": not config.bias},
        {"head_dense": True, "logit_bias": True},
    ]
    updates += [{"labels": tuple("abcde")}, {"spans": True}]
    return [ModelConfig(**config.model_dump() | update) for update in updates]


@pytest.mark.parametrize("name", RECURRENT)
@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_the_closed_form_counts_recurrent_layers(name: str, cell: str) -> None:
    tagger = {"labels": ("a", "b", "c"), "crf": True} if name == "lstm encoder" else {}
    for updates in ({"cell": cell}, {"cell": cell, "logit_bias": True}, {"cell": cell, **tagger}):
        config = ModelConfig(**RECURRENT[name].model_dump() | updates)
        assert num_parameters(config) == sum(p.numel() for p in build(config, 0).parameters()), config


def test_an_alignment_looks_at_the_source_and_never_at_its_own_row() -> None:
    fixed, aligned = (
        ModelConfig(**RECURRENT["lstm additive"].model_dump() | {"alignment": kind})
        for kind in ("none", "additive")
    )
    once, twice = (train_flops_per_row(fixed, n, 10) for n in (20, 40))
    encoder = 6 * 10 * 2 * 2 * 4 * 16 * (32 + 16 + 2)
    assert twice - once == once - encoder  # a step costs the same however far it stands
    more = 6 * ((2 * 32 + 1) * 32 + (2 * 32 + 1) * 32 + 4 * 32 * 32)
    assert train_flops_per_row(aligned, 20, 10) - once == 20 * (more + 12 * 32 * 10)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_closed_form_counts_what_is_built(name: str) -> None:
    for config in _variants(CONFIGS[name]):
        assert num_parameters(config) == sum(p.numel() for p in build(config, 0).parameters()), config


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_every_preset_has_the_parameters_its_header_says(path: Path) -> None:
    with torch.device("meta"):
        built = sum(p.numel() for p in Transformer(_preset(path)).parameters())
    size = path.read_text().splitlines()[0].removeprefix("# ").split()[0]
    unit = {"M": 1e6, "B": 1e9}[size[-1]]
    assert num_parameters(_preset(path)) == built
    assert math.isclose(built, float(size[:-1]) * unit, rel_tol=0.06 if built < 2e6 else 0.01)


def test_flops_follow_the_convention_of_the_peers() -> None:
    """The shapes and formulas of bench/gpu_peers.py, by hand."""
    llama = _preset(next(p for p in PRESETS if p.stem == "decoder-110m"))
    n = 32000 * 768 + 12 * (4 * 768**2 + 3 * 768 * 2048 + 2 * 768) + 768
    assert train_flops_per_row(llama, 1024) == 1024 * (6 * n + 12 * 12 * 768 * 1024)
    t5 = _preset(next(p for p in PRESETS if p.stem == "encoder-decoder-base"))
    mlp, attention = 3 * 768 * 2048, 4 * 768**2
    encoder = 12 * (attention + mlp + 4 * 768) + 768
    decoder = 12 * (2 * attention + mlp + 6 * 768) + 768 + 32128 * 768
    expected = (
        6 * encoder * 512 + 12 * 12 * 768 * 512 * 512 + 6 * decoder * 114 + 12 * 12 * 768 * 114 * (114 + 512)
    )
    assert train_flops_per_row(t5, 114, 512) == expected


def test_position_tables_cost_no_flops() -> None:
    short, long = (CONFIGS["gpt2"].model_copy(update={"max_positions": n}) for n in (32, 64))
    assert num_parameters(long) > num_parameters(short) and train_flops_per_row(
        long, 16
    ) == train_flops_per_row(short, 16)
