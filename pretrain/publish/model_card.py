"""The model card: what a published model is, what it read, how well it did, where it comes from, and how to
load it.

In: a run folder and the checkpoint that is published. Out: the text of README.md.
"""

import math
from pathlib import Path
from typing import Any

import yaml

from trifold.pretrain.checkpoint.checkpoint import Checkpoint
from trifold.pretrain.publish.published_folder import read_json, recorded_config
from trifold.pretrain.storage.jsonl import read_lines

_LOADING = {  # the hub's tag, the stock class, an example
    "decoder": (
        "text-generation",
        "AutoModelForCausalLM",
        """\
tokens = model.generate(**tokenizer("Once upon a time", return_tensors="pt"), max_new_tokens=40)
print(tokenizer.decode(tokens[0], skip_special_tokens=True))""",
    ),
    "encoder": (
        "fill-mask",
        "AutoModelForMaskedLM",
        """\
logits = model(**tokenizer("The capital of France is<mask>.", return_tensors="pt")).logits
print(tokenizer.decode(logits[0].argmax(-1)))""",
    ),
    "encoder-decoder": (
        "text2text-generation",
        "AutoModelForSeq2SeqLM",
        """\
tokens = model.generate(**tokenizer("Once upon a<extra_id_0>.", return_tensors="pt"), max_new_tokens=40)
print(tokenizer.decode(tokens[0]))""",
    ),
    "labels": (
        "token-classification",
        "AutoModelForTokenClassification",
        """\
labels = model(**tokenizer("Ada went to Rome", return_tensors="pt")).logits[0].argmax(-1)
print([model.config.id2label[int(label)] for label in labels])""",
    ),
    "spans": (
        "question-answering",
        "AutoModelForQuestionAnswering",
        """\
out = model(**(asked := tokenizer("Where did Ada go?", "Ada went to Rome.", return_tensors="pt")))
print(tokenizer.decode(asked.input_ids[0, out.start_logits.argmax() : out.end_logits.argmax() + 1]))""",
    ),
}

_STOCK = """\
```python
from transformers import AutoTokenizer, {auto_class}
tokenizer = AutoTokenizer.from_pretrained(folder)
model = {auto_class}.from_pretrained(folder)
{example}
```"""
_OWN = """\
A recurrent model has no stock class. The tokenizer loads as `AutoTokenizer`; the model loads in Trifold, as in
```
trifold generate FOLDER "a text"
```"""


def render(run: Path, source: Checkpoint, record: dict[str, Any], stock_class: str) -> str:
    """The card, in Markdown with the hub's header."""
    config, state = recorded_config(record), source.state
    kind = "labels" if config.labels else "spans" if config.spans else config.family
    tag, auto_class, example = _LOADING[kind]
    auto_class = "T5GemmaForTokenClassification" if stock_class.startswith("T5GemmaForToken") else auto_class
    own = config.cell != "attention"
    loading = _OWN if own else _STOCK.format(auto_class=auto_class, example=example)
    parameters = sum(math.prod(source.shape(name)) for name in source.names)
    recipe = yaml.safe_dump(state.config, sort_keys=False, allow_unicode=True)
    return f"""\
---
library_name: {"trifold" if own else "transformers"}
pipeline_tag: {tag}
tags: [trifold]
---
# {stock_class}, trained with Trifold

{parameters:,} parameters, {config.num_layers} layers of {config.dim}, {
        config.vocab_size:,} pieces, documents up to \
{config.max_positions:,} tokens. Trained for {state.step:,} steps{_tokens(state.extra)}.{
        _averaged(record, state.config)
    }

## Load it
{loading}

## Held-out scores
{_scores(run, state.step)}

## Data
{_data(run, state.config)}

## Where it comes from
{
        _list(
            {
                "checkpoint": f"{record['checkpoint']['name']}, sha256 {record['checkpoint']['sha256']}, {record['checkpoint']['time']}",
                "code": record["code"] or "unknown",
                "packages": ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
                "data fingerprint": record["fingerprints"]["data"],
                "tokenizer fingerprint": record["fingerprints"]["tokenizer"],
            }
        )
    }

## Recipe
```yaml
{recipe}```
"""


def _tokens(extra: dict[str, Any]) -> str:
    return f", {extra['tokens']:,} tokens" if "tokens" in extra else ""


def _averaged(record: dict[str, Any], recipe: dict[str, Any]) -> str:
    if record["weights"] == "trained":
        return ""
    return f" These weights are the exponential moving average of the trained ones, with a decay of {recipe['ema']:g} per step."


def _scores(run: Path, step: int) -> str:
    """The last evaluation at or before the checkpoint's step; a later generation's line of the same step
    counts.
    """
    lines = [
        line for line in read_lines(run / "metrics.jsonl") if "heldout_loss" in line and line["step"] <= step
    ]
    if not lines:
        return "None were taken."
    last = max(reversed(lines), key=lambda line: (line["step"], line.get("generation", 0)))
    names = {
        "heldout_loss": "loss, nats per target",
        "perplexity": "perplexity",
        "bits_per_byte": "bits per byte",
        "accuracy": "accuracy",
        "heldout_targets": "targets",
    }
    for name in last:  # the parts of a mixture
        if name.startswith("heldout_loss_") and not name.endswith("_ema"):
            names[name] = f"loss of {name.removeprefix('heldout_loss_')}, nats per target"
    names |= {f"{name}_ema": f"{said}, averaged weights" for name, said in names.items()}
    held_out = _list(
        {"step": last["step"], **{said: last[name] for name, said in names.items() if name in last}}
    )
    return held_out + (_task_scores(read_json(run / "scores.json")) if (run / "scores.json").exists() else "")


def _task_scores(found: dict[str, Any]) -> str:
    """What a fine-tuning run reached on all of its dev examples, beside a trivial system."""
    intervals, trivial = found["intervals"], found["trivial"]
    rows = "\n".join(
        f"| {name} | {score:.2f} | {intervals[name][0]:.2f} to {intervals[name][1]:.2f} |"
        f" {trivial['scores'][name]:.2f} |"
        for name, score in found["scores"].items()
    )
    head = f"| {found['task']}, {found['examples']:,} examples, step {found['step']} | score | 95 % interval | {trivial['system']} |"
    signatures = "\n".join(f"- {name}: {signature}" for name, signature in found["signatures"].items())
    return f"\n\n{head}\n|---|---|---|---|\n{rows}\n\n{signatures}"


def _data(run: Path, recipe: dict[str, Any]) -> str:
    if "data" not in recipe:
        tasks = [recipe["task"], *recipe["more"]]
        told = {
            f"{task['kind']}, {side}": ", ".join(task[side]) for task in tasks for side in ("train", "dev")
        }
        return _list({"started from": recipe["model"].get("from") or "new weights", **told})
    data = recipe["data"]
    told = {
        f"{kind}-{i}": source.get("path") or source.get("hub")
        for kind in ("sources", "heldout")
        for i, source in enumerate(data[kind])
    }
    cache = Path(data["cache"] or run / "shards")
    for index in sorted(cache.glob("*/*/index.json")):
        shards = read_json(index)
        told[str(index.parent.relative_to(cache))] = (
            f"{shards['documents']:,} documents, {shards['tokens']:,} tokens, {shards['bytes']:,} bytes"
        )
    return _list(told)


def _list(facts: dict[str, Any]) -> str:
    return "\n".join(
        f"- {name}: {f'{value:.4f}' if isinstance(value, float) else value}" for name, value in facts.items()
    )
