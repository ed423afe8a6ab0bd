"""The model card of a published folder: what the model is, how to load it, its scores, its data and its
provenance.

A run folder and the checkpoint that is published come in; the text of README.md goes out.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from trifold.modeling.config import ModelConfig
from trifold.pretrain.checkpoint.checkpoint import Checkpoint
from trifold.pretrain.data.tokenizer.tokenizer import Tokenizer
from trifold.pretrain.monitor.run_folder import metrics_backwards
from trifold.pretrain.publish.published_folder import recorded_config
from trifold.pretrain.storage.json_files import read_json_object

_USE = {  # the Hub's pipeline tag, the stock class, an example
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
logits = model(**tokenizer("The capital of France is{hidden}.", return_tensors="pt")).logits
print(tokenizer.decode(logits[0].argmax(-1)))""",
    ),
    "encoder-decoder": (
        "text2text-generation",
        "AutoModelForSeq2SeqLM",
        """\
tokens = model.generate(**tokenizer("Once upon a{hidden}.", return_tensors="pt"), max_new_tokens=40)
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
out = model(**(inputs := tokenizer("Where did Ada go?", "Ada went to Rome.", return_tensors="pt")))
print(tokenizer.decode(inputs.input_ids[0, out.start_logits.argmax() : out.end_logits.argmax() + 1]))""",
    ),
}

_STOCK_LOADING = """\
```python
from transformers import AutoTokenizer, {auto_class}
tokenizer = AutoTokenizer.from_pretrained(folder)
model = {auto_class}.from_pretrained(folder)
{example}
```"""
_RECURRENT_LOADING = """\
transformers has no class for this recurrent model. The tokenizer loads as `AutoTokenizer`; the model loads in
Trifold:
```
trifold generate FOLDER "a text"
```"""

_CARD = """\
---
library_name: {library}
pipeline_tag: {tag}
tags: [trifold]
---
# {stock_class}, trained with Trifold

{summary}

## How to use
{loading}

## Evaluation
{scores}

## Training data
{data}

## Training recipe
```yaml
{recipe}```

## Provenance
{provenance}
"""


def render(
    run: Path, source: Checkpoint, record: Mapping[str, Any], stock_class: str, tokenizer: Tokenizer
) -> str:
    """The card, in Markdown with the Hub's YAML header."""
    config, state = recorded_config(record), source.state
    is_recurrent = config.cell != "attention"
    kind = "labels" if config.labels else "spans" if config.spans else config.family
    tag, auto_class, example = _USE[kind]
    if stock_class.startswith("T5GemmaForToken"):  # no auto class knows it
        auto_class = "T5GemmaForTokenClassification"
    example = example.replace("{hidden}", _hidden_token(config, tokenizer))

    return _CARD.format(
        library="trifold" if is_recurrent else "transformers",
        tag=tag,
        stock_class=stock_class,
        summary=_summary(source, record, config),
        loading=(
            _RECURRENT_LOADING
            if is_recurrent
            else _STOCK_LOADING.format(auto_class=auto_class, example=example)
        ),
        scores=_scores(run, state.step),
        data=_data(run, state.config),
        recipe=yaml.safe_dump(state.config, sort_keys=False, allow_unicode=True),
        provenance=_provenance(record),
    )


def _hidden_token(config: ModelConfig, tokenizer: Tokenizer) -> str:
    """The token that stands for hidden text, as users of this tokenizer write it; "" where there is none."""
    if config.family == "encoder-decoder" and tokenizer.sentinels:
        return tokenizer.decode(tokenizer.sentinels[:1])
    if tokenizer.mask is None:
        return ""
    written = tokenizer.decode([tokenizer.mask])
    # trained here, a mask takes the space before its word; BERT's tokenizers split at spaces
    return written if tokenizer.is_trained_here else f" {written}"


def _summary(source: Checkpoint, record: Mapping[str, Any], config: ModelConfig) -> str:
    parameters = sum(math.prod(source.shape(name)) for name in source.names)
    sentences = [
        f"{parameters:,} parameters, {config.num_layers} layers of width {config.dim}, a vocabulary of"
        f" {config.vocab_size:,} tokens, at most {config.max_positions:,} positions.",
        f"Trained for {source.state.step:,} steps, {source.state.tokens:,} tokens.",
    ]
    if record["weights"] == "ema":
        sentences.append(
            "These weights are the exponential moving average of the trained ones, with a decay of"
            f" {source.state.config['ema']:g} per step."
        )
    return " ".join(sentences)


def _provenance(record: Mapping[str, Any]) -> str:
    checkpoint = record["checkpoint"]
    return _list(
        {
            "checkpoint": f"{checkpoint['name']}, sha256 {checkpoint['sha256']}, {checkpoint['time']}",
            "code": record["code"] or "unknown",
            "packages": ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
            "data fingerprint": record["fingerprints"]["data"],
            "tokenizer fingerprint": record["fingerprints"]["tokenizer"],
        }
    )


def _scores(run: Path, step: int) -> str:
    """The last evaluation at or before the checkpoint's step, and the scores of a fine-tuned model."""
    evaluations = [line for line in metrics_backwards(run, "heldout_loss") if line["step"] <= step]
    if not evaluations:
        return "Not evaluated."
    # a later generation has trained the same step again: its line counts
    last = max(evaluations, key=lambda line: (line["step"], line.get("generation", 0)))
    labels = _metric_labels(last)
    measured = {label: last[name] for name, label in labels.items() if name in last}
    held_out = f"On held-out data:\n\n{_list({'step': last['step'], **measured})}"
    task_scores = run / "scores.json"
    if not task_scores.exists():
        return held_out
    seeds = run.parent / "seeds.json"
    of_seeds = _seed_scores(read_json_object(seeds), run.name) if seeds.exists() else ""
    return held_out + _task_scores(read_json_object(task_scores)) + of_seeds


def _metric_labels(metrics: Mapping[str, Any]) -> dict[str, str]:
    """What the card calls each metric of an evaluation."""
    labels = {
        "heldout_loss": "loss, nats per target",
        "perplexity": "perplexity",
        "bits_per_byte": "bits per byte",
        "accuracy": "accuracy",
        "heldout_targets": "targets",
    }
    for name in metrics:  # one loss for each objective of a mixture
        if name.startswith("heldout_loss_") and not name.endswith("_ema"):
            labels[name] = f"loss of {name.removeprefix('heldout_loss_')}, nats per target"
    return labels | {f"{name}_ema": f"{label}, averaged weights" for name, label in labels.items()}


def _task_scores(result: Mapping[str, Any]) -> str:
    """The scores of a fine-tuned model on all dev examples, and on test, beside those of a trivial
    baseline.
    """
    title = f"{result['task']}, {result['examples']:,} dev examples, step {result['step']}"
    lines = ["\n", *_score_rows(title, result)]
    if test := result.get("test"):
        title = f"{result['task']}, {test['examples']:,} test examples, scored once after dev chose the step"
        lines += ["", *_score_rows(title, test)]
    signatures = [f"- {name}: {signature}" for name, signature in result["signatures"].items()]
    notes = [f"- {note}" for note in result.get("notes", ())]
    return "\n".join([*lines, "", *signatures, *notes])


def _score_rows(examples: str, result: Mapping[str, Any]) -> list[str]:
    """A table of scores with their intervals, beside the baseline's."""
    intervals, baseline = result["intervals"], result["trivial"]
    rows = [f"| {examples} | score | 95 % interval | {baseline['system']} |", "|---|---|---|---|"]
    for name, score in result["scores"].items():
        low, high = intervals[name]
        rows.append(f"| {name} | {score:.2f} | {low:.2f} to {high:.2f} | {baseline['scores'][name]:.2f} |")
    return rows


def _seed_scores(summary: Mapping[str, Any], folder: str) -> str:
    """Mean and standard deviation over the seeds of a fine-tuning run, of which this folder is one."""
    if folder not in summary["seeds"]:
        return ""
    rows = [
        f"| {len(summary['seeds'])} seeds | mean | standard deviation | this model |",
        "|---|---|---|---|",
    ]
    for name, average in summary["mean"].items():
        this = summary["seeds"][folder]["scores"][name]
        rows.append(f"| {name} | {average:.2f} | {summary['spread'][name]:.2f} | {this:.2f} |")
    chosen = (
        f"This model is the best of them on dev, by {summary['best']}:"
        " the mean says what to expect of one run."
    )
    note = chosen if folder == summary["published"] else ""
    return "\n".join(["\n", *rows, "", note])


def _data(run: Path, recipe: Mapping[str, Any]) -> str:
    return _list(_task_data(recipe) if "data" not in recipe else _corpora(run, recipe["data"]))


def _task_data(recipe: Mapping[str, Any]) -> dict[str, Any]:
    facts = {"started from": recipe["model"].get("from") or "new weights"}
    for task in (recipe["task"], *recipe["more"]):
        for split in ("train", "dev", "test"):
            if task.get(split):
                facts[f"{task['kind']}, {split}"] = ", ".join(task[split])
    return facts


def _corpora(run: Path, data: Mapping[str, Any]) -> dict[str, Any]:
    facts = {}
    for kind in ("sources", "heldout"):
        for i, source in enumerate(data[kind]):
            facts[f"{kind}-{i}"] = source.get("path") or source.get("hub")
    cache = Path(data["cache"] or run / "shards")
    for index in sorted(cache.glob("*/*/index.json")):
        size = read_json_object(index)
        facts[str(index.parent.relative_to(cache))] = (
            f"{size['documents']:,} documents, {size['tokens']:,} tokens, {size['bytes']:,} bytes"
        )
    return facts


def _list(facts: Mapping[str, Any]) -> str:
    lines = []
    for name, value in facts.items():
        shown = f"{value:.4f}" if isinstance(value, float) else value
        lines.append(f"- {name}: {shown}")
    return "\n".join(lines)
