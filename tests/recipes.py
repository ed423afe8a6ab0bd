"""Recipes of tiny pretraining runs, and their text."""

import random
from pathlib import Path
from typing import Any

from trifold.modeling.config import ModelConfig
from trifold.pretrain.config import pretraining as dials
from trifold.pretrain.config import training
from trifold.pretrain.config.pretraining import PretrainConfig

OBJECTIVES = {
    "decoder": dials.CausalConfig(),
    "encoder": dials.MaskedConfig(),
    "encoder-decoder": dials.SpansConfig(density=0.3),
}


def write_corpus(path: Path, documents: int = 300) -> None:
    draw = random.Random(0)
    names = ["Anna", "Ben", "Cora", "Dan", "Rome", "Paris", "Oslo", "Lima"]
    verbs = ["lives in", "walks to", "dreams of", "writes about", "left", "remembers"]
    texts = (
        " ".join(
            f"{draw.choice(names)} {draw.choice(verbs)} {draw.choice(names)}."
            for _ in range(draw.randint(1, 12))
        )
        for _ in range(documents)
    )
    path.write_text("\n\n".join(texts))


def recipe(folder: Path, run: str, family: Any = "decoder", **changes: Any) -> PretrainConfig:
    corpus = folder / "corpus.txt"
    if not corpus.exists():
        write_corpus(corpus)
    shape: dict[str, Any] = {
        "dim": 32,
        "num_layers": 2,
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_dim": 16,
        "mlp_dim": 48,
    }
    model = ModelConfig(family=family, vocab_size=400, max_positions=64, dropout=0.1, **shape)
    values: dict[str, Any] = {
        "model": model,
        "data": dials.DataConfig(
            sources=(dials.SourceConfig(path=str(corpus)),),
            heldout_fraction=0.1,
            row_length=48,
            cache=str(folder / f"shards-{family}"),
        ),
        "objective": OBJECTIVES[family],
        "optimizer": training.OptimizerConfig(lr=3e-3),
        "checkpoints": training.CheckpointConfig(every=4, keep_last=3),
        "steps": 12,
        "step_rows": 6,
        "micro_rows": 2,
        "evaluate_every": 6,
        "evaluate_rows": 8,
    }
    return PretrainConfig(run=str(folder / run), **(values | changes))


def model_config(config: PretrainConfig) -> ModelConfig:
    """The model of a recipe that describes one, and does not name a published folder."""
    assert isinstance(config.model, ModelConfig)
    return config.model
