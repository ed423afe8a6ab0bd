"""Do two installations of Trifold learn the same numbers, bit for bit?

    python tests/same_numbers.py record OLD/.venv/bin/trifold old.json
    python tests/same_numbers.py record NEW/.venv/bin/trifold new.json
    python tests/same_numbers.py compare old.json new.json

Only the command line is used, so that the two may differ in every Python name. Recorded, at 1 and 2 ranks:
the loss, gradient norm and row hash of 20 steps of a decoder, an encoder, an encoder-decoder and one
fine-tune, their held-out losses, and the sha256 of the published tensors and tokenizer. Cost: about 4 minutes
on 2 cores.
"""

import hashlib
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

CONFIGS = Path(__file__).parents[1] / "configs"
STEPS = 20
OBJECTIVES: dict[str, dict[str, Any]] = {
    "decoder": {"kind": "causal"},
    "encoder": {"kind": "masked", "rate": 0.3},
    "encoder-decoder": {"kind": "spans"},
}
PUBLISHED = ("model.safetensors", "tokenizer.json")


def record(trifold: str, out: Path) -> None:
    """Run everything with one installation's command and write what it learned."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_texts(folder)
        found: dict[str, Any] = {}
        for workers in (0, 2):
            for family, objective in OBJECTIVES.items():
                run = folder / f"{family}-{workers}"
                found[run.name] = _train(
                    trifold, "pretrain", run, _pretraining(folder, family, objective), workers
                )
            run = folder / f"tags-{workers}"
            model = folder / f"encoder-{workers}-published"
            found[run.name] = _train(trifold, "finetune", run, _finetuning(folder, model), workers)
    out.write_text(json.dumps(found, indent=1), encoding="utf-8")


def compare(old: Path, new: Path) -> int:
    """Print what was compared and each difference; the number of differences."""
    before, after = (json.loads(path.read_text(encoding="utf-8")) for path in (old, new))
    compared = different = 0
    for run in sorted(before.keys() | after.keys()):
        left, right = before.get(run, {}), after.get(run, {})
        for key in sorted(left.keys() | right.keys()):
            compared += 1
            if left.get(key) != right.get(key):
                different += 1
                print(f"{run} {key}: {left.get(key)} before, {right.get(key)} after")
    print(f"{compared} values of {len(before)} runs compared, {different} differ")
    return different


def _train(trifold: str, command: str, run: Path, recipe: dict[str, Any], workers: int) -> dict[str, Any]:
    path = run.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe | {"run": str(run)}), encoding="utf-8")
    published = run.with_name(f"{run.name}-published")
    _call(trifold, command, str(path), "--workers", str(workers))
    _call(trifold, "publish", str(run), "--out", str(published))
    found: dict[str, Any] = {}
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        for key in ("loss", "grad_norm", "rows_hash", "rows", "heldout_loss", "f1"):
            if key in values:
                found[f"step {values['step']} {key}"] = values[key]
    for file in PUBLISHED:
        found[f"sha256 of {file}"] = hashlib.sha256((published / file).read_bytes()).hexdigest()
    return found


def _call(*command: str) -> None:
    print(*command[1:], flush=True)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} exited {done.returncode}:\n{done.stdout}\n{done.stderr}")


def _pretraining(folder: Path, family: str, objective: dict[str, Any]) -> dict[str, Any]:
    return {
        "extends": str(CONFIGS / "model" / f"{family}-tiny.yaml"),
        "model": {"vocab_size": 396, "dropout": 0.1},
        "data": {"sources": [{"path": str(folder / "text.txt")}], "heldout_fraction": 0.1, "row_length": 64},
        "objective": objective,
        "engine": {"precision": "fp32"},
        "cluster": {"threads_per_worker": 1},
        "optimizer": {"lr": 3e-3},
        "schedule": {"kind": "cosine", "warmup_steps": 5},
        "checkpoints": {"every": 10},
        "evaluate_every": 10,
        "evaluate_rows": 16,
        "steps": STEPS,
        "step_rows": 8,
        "micro_rows": 2,
    }


def _finetuning(folder: Path, model: Path) -> dict[str, Any]:
    return {
        "model": {"from": str(model), "dropout": 0.0},
        "task": {"kind": "ner", "train": [str(folder / "train.conll")], "dev": [str(folder / "dev.conll")]},
        "engine": {"precision": "fp32"},
        "cluster": {"threads_per_worker": 1},
        "optimizer": {"lr": 1e-3},
        "schedule": {"kind": "cosine", "warmup_steps": 5},
        "checkpoints": {"every": 10},
        "evaluate_every": 10,
        "row_length": 64,
        "steps": STEPS,
        "step_rows": 8,
        "micro_rows": 2,
    }


def _write_texts(folder: Path) -> None:
    """A corpus of sentences and two files of tagged ones, the same at every call."""
    rng = random.Random(0)
    names, places = ["Anna", "Bert", "Carla", "Dora", "Emil"], ["Oslo", "Lima", "Rome", "Bern"]
    verbs, nouns = ["sees", "finds", "paints", "sells"], ["house", "river", "green door", "old boat", "field"]

    def sentence() -> list[tuple[str, str]]:
        words = [(rng.choice(names), "B-PER"), (rng.choice(verbs), "O"), ("the", "O")]
        words += [(word, "O") for word in rng.choice(nouns).split()]
        return [*words, ("in", "O"), (rng.choice(places), "B-LOC"), (".", "O")]

    documents = [[sentence() for _ in range(rng.randint(2, 6))] for _ in range(600)]
    texts = ["\n".join(" ".join(word for word, _ in words) for words in document) for document in documents]
    (folder / "text.txt").write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    for name, count in (("train", 200), ("dev", 40)):
        lines = ["\n".join(f"{word} {tag}" for word, tag in sentence()) for _ in range(count)]
        (folder / f"{name}.conll").write_text("\n\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["record", trifold, out]:
            record(trifold, Path(out))
        case ["compare", old, new]:
            sys.exit(1 if compare(Path(old), Path(new)) else 0)
        case _:
            sys.exit(__doc__)
