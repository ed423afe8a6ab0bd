"""Tiny published folders and task files for the tests of finetune/: a tokenizer, random models of each
family, tags and pairs.
"""

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

from tests.published import MODELS
from trifold.finetune.config import FinetuneConfig
from trifold.modeling.config import ModelConfig
from trifold.modeling.transformer import build
from trifold.pretrain.config.pretraining import TokenizerConfig as TokenizerConfig
from trifold.pretrain.data.tokenizer.tokenizer import Tokenizer, train
from trifold.pretrain.publish import published_folder

NAMES = "Ada Bob Cleo Dan Eve Finn Gus Hana".split()
VERBS = "sees calls knows likes".split()


@cache
def vocabulary(folder: Path) -> Tokenizer:
    texts = (f"Mr {a} {v} {b}. In {a} we {v} {b}, yes." for a in NAMES for b in NAMES for v in VERBS)
    return train([*texts], TokenizerConfig(), 395, folder / "vocabulary")


def folder_of(where: Path, family: str, **changes: Any) -> Path:
    """A published folder with new weights."""
    name = {"encoder": "modernbert", "decoder": "llama", "encoder-decoder": "t5gemma"}[family]
    tokenizer = vocabulary(where)
    config = ModelConfig(
        **MODELS[name].model_dump()
        | {
            "vocab_size": tokenizer.vocab_size,
            "dim": 48,
            "num_layers": 2,
            "num_heads": 4,
            "num_kv_heads": 4,
            "head_dim": 12,
            "mlp_dim": 96,
            "embed_scale": 48**0.5 if family == "encoder-decoder" else 1.0,
            "init_std": 0.1,
        }
        | changes
    )
    folder = where / f"published-{family}"
    folder.mkdir()
    published_folder.write_folder(folder, config, build(config, 5).state_dict(), tokenizer)
    published_folder.write_record(folder, config, tokenizer, "no data", {})
    return folder


def write_tags(path: Path, sentences: int, seed: int) -> None:
    """A name is a person after "Mr" and a place after "In": its usual tag is no help."""
    draw, lines = random.Random(seed), ["-DOCSTART- O", ""]
    for _ in range(sentences):
        a, b, verb = draw.choice(NAMES), draw.choice(NAMES), draw.choice(VERBS)
        lines += [
            f"Mr O\n{a} B-PER\n{verb} O\n{b} O"
            if draw.random() < 0.5
            else f"In O\n{a} B-LOC\nwe O\n{verb} O\n{b} O",
            "",
        ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_pairs(path: Path, lines: int, seed: int) -> str:
    """A made-up language: the verb comes last, and names are written backwards."""
    draw, sources, targets = random.Random(seed), [], []
    for _ in range(lines):
        a, b, verb = draw.choice(NAMES), draw.choice(NAMES), draw.choice(VERBS)
        sources.append(f"Mr {a} {verb} {b}.")
        targets.append(f"{b} Mr {a} {verb}.")
    for name, texts in (("a", sources), ("b", targets)):
        path.with_suffix(f".{name}").write_text("\n".join(texts) + "\n", encoding="utf-8")
    return f"{path.with_suffix('.a')},{path.with_suffix('.b')}"


def recipe(run: Path, folder: Path, task: dict[str, Any], **changes: Any) -> FinetuneConfig:
    values = {
        "run": str(run),
        "model": {"from": str(folder)},
        "task": task,
        "row_length": 64,
        "steps": 40,
        "step_rows": 6,
        "micro_rows": 2,
        "optimizer": {"lr": 3e-3},
        "schedule": {"warmup_steps": 1},
        "evaluate_every": 20,
        "checkpoints": {"every": 20},
        "evaluate_examples": 40,
        "generation": {"max_new": 24},
    }
    return FinetuneConfig.model_validate_json(json.dumps(values | changes))
