"""The checks of a folder's files: hashes, tensors, settings, tokenizer.

What Trifold and the stock class read of a folder comes in; one named Check each goes out (verify.py says in
which order).
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from trifold.modeling.config import Family, ModelConfig
from trifold.modeling.generation.config import Generation
from trifold.modeling.huggingface import ImportedModel
from trifold.modeling.huggingface.fields import bears_on_logits, flat, lost, same
from trifold.pretrain.data.tokenizer.tokenizer import Tokenizer
from trifold.pretrain.publish.parity import Check
from trifold.pretrain.publish.published_folder import GENERATION, RECORD, measure, read_generation
from trifold.pretrain.publish.weights import INDEX, WEIGHTS
from trifold.pretrain.storage.json_files import read_json_object

HARD_LINES = (
    "",
    "A plain sentence, with 1,234.5 numbers.",
    "  leading and  doubled   spaces ",
    "tabs\tand\nline ends\r\n",
    "日本語の文章。東京は大きい。",
    "emoji 👩‍👩‍👧‍👦 and 🏳️‍🌈, e\u0301 combining, ﬁ ligature",
    "control \x00\x07\x1b and \u200b zero width, \ufeff mark",
    "Ω≈ç√∫ Привет שלום ﷽",
    "a literal <s> and </s>, <mask> and <extra_id_7> inside",
    "x" * 300,
)
_SHOWN = 4  # mistakes that a check lists


def hashes(folder: Path, record: Mapping[str, Any]) -> Check:
    """Every file is the one that was published."""
    if not record:
        return Check("files", True, f"no {RECORD} here: made elsewhere, nothing to compare hashes with")
    recorded, measured = record["files"], measure(folder)
    wrong = []
    for name, digest in sorted(recorded.items()):
        if name not in measured:
            wrong.append(f"{name} is missing")
        elif measured[name] != digest:
            wrong.append(f"{name} is not what was published (sha256 differs)")
    return Check("files", not wrong, "; ".join(wrong) or f"{len(recorded)} files match {RECORD}")


def index(folder: Path, tensors: Mapping[str, Tensor]) -> Check:
    """One file, or shards and an index that gives their total size; never both. (An index that lacks a tensor
    was rejected on reading.)
    """
    if not (folder / INDEX).exists():
        return Check("index", True, "all weights are in one file")
    if (folder / WEIGHTS).exists():
        return Check("index", False, f"{WEIGHTS} lies beside {INDEX}: stock classes read either")
    metadata = read_json_object(folder / INDEX).get("metadata")
    total_size = metadata.get("total_size") if isinstance(metadata, dict) else None
    size = sum(tensor.nbytes for tensor in tensors.values())
    detail = f"{len(tensors)} tensors of {size} bytes; the index says {total_size}"
    return Check("index", total_size in (None, size), detail)


def tensors(found: ImportedModel, read: Mapping[str, Tensor]) -> Check:
    """What Trifold reads of a folder, and what it drops because the architecture's class has no such tensors;
    publish writes none of those.
    """
    detail = f"{len(read)} in the folder, {len(found.state)} in the model"
    if found.dropped:
        detail += f"; dropped: {', '.join(found.dropped)}"
    if found.fresh:
        detail += f"; missing, and initialised: {', '.join(found.fresh)}"
    return Check("tensors", True, detail)


def config(trained: ModelConfig, read: ModelConfig) -> Check:
    """config.json describes the model that was trained."""
    if wrong := lost(trained, read):
        return Check("config", False, f"config.json has no {', '.join(wrong)}")
    return Check("config", True, f"describes the {trained.family} that was trained")


def weights(read: Mapping[str, Tensor], expected: Mapping[str, Tensor], carried: Collection[str]) -> Check:
    """The folder's tensors are the trained ones, bit for bit, and those that were carried along."""
    wrong = []
    for name in sorted((read.keys() | expected.keys()) - {str(name) for name in carried}):
        if name not in read or name not in expected or not torch.equal(read[name], expected[name]):
            wrong.append(name)
    if wrong:
        return Check("weights", False, f"{', '.join(wrong[:_SHOWN])} differ from the trained ones")
    return Check("weights", True, "bit for bit the trained ones")


def dtype(named: str, tensors: Mapping[str, Tensor]) -> Check:
    """The tensors have the dtype that config.json names."""
    wrong = [
        f"{name} is {tensor.dtype}"
        for name, tensor in tensors.items()
        if str(tensor.dtype) != f"torch.{named}"
    ]
    if wrong:
        return Check("dtype", False, f"config.json says {named}, but {', '.join(wrong[:_SHOWN])}")
    return Check("dtype", True, f"{named}, as config.json says")


def tokenizer(fast: Any, ours: Tokenizer, family: Family, record: Mapping[str, Any]) -> Check:
    """The stock tokenizer gives the ids that training read, and in our folders the special tokens around
    them; one trained by Trifold gives every text back.
    """
    wrong = []
    before, after = ours.special_prefix_suffix(family)
    for line, array in zip(HARD_LINES, ours.encode_batch(HARD_LINES), strict=True):
        ids, start = [int(i) for i in array], repr(line[:20])
        if fast(line, add_special_tokens=False)["input_ids"] != ids:
            wrong.append(f"{start} is encoded differently")
        if fast.decode(ids, clean_up_tokenization_spaces=False) != ours.decode(ids):
            wrong.append(f"{start} is decoded differently")
        if record and fast(line)["input_ids"] != [*before, *ids, *after]:
            wrong.append(f"{start} has other special tokens around it than a {family} trains with")
        if ours.is_trained_here and ours.decode(ids) != line:
            wrong.append(f"{start} is not what its tokens decode to")
    if record and record["fingerprints"]["tokenizer"] != ours.fingerprint:
        wrong.append("its fingerprint is not the one the model was trained with")
    detail = f"{len(HARD_LINES)} hard lines are encoded and decoded alike"
    return Check("tokenizer", not wrong, "; ".join(wrong[:_SHOWN]) or detail)


def pair(fast: Any, ours: Tokenizer, token_types: int) -> Check:
    """The stock tokenizer makes of a question and its context the ids and token types that training read."""
    texts = HARD_LINES[1], HARD_LINES[4]
    question, context = ([int(i) for i in array] for array in ours.encode_batch(texts))
    before, between, after = ours.pair_special_tokens()
    head = [*before, *question, *between]
    encoded = fast(*texts)
    if encoded["input_ids"] == [*question, *context]:  # GPT-2's: nothing that training could follow
        return Check(
            "pair",
            True,
            "the stock tokenizer puts no special tokens around a pair; training reads BOS, EOS and EOS",
        )
    wrong = []
    if encoded["input_ids"] != [*head, *context, *after]:
        wrong.append("a question and its context have other special tokens around them than in training")
    trained_types = [0] * len(head) + [int(ours.gives_token_types)] * (len(context) + len(after))
    if token_types > 1 and encoded.get("token_type_ids", [0] * len(trained_types)) != trained_types:
        wrong.append("a question and its context have other token types than in training")
    return Check("pair", not wrong, "; ".join(wrong) or "a question and its context are read as in training")


def special_tokens(
    folder: Path, fast: Any, ours: Tokenizer, vocab_size: int, record: Mapping[str, Any]
) -> Check:
    """Each file that names a special token gives it the same id, but that a recipe may set another decoder
    start for generation. A tokenizer made elsewhere may not name all of them.
    """
    wrong = []
    if ours.vocab_size > vocab_size:
        wrong.append(f"{ours.vocab_size} tokens, but {vocab_size} rows of embeddings")
    fields = {role: f"{role}_token_id" for role in ("pad", "bos", "eos", "unk", "mask")}
    fields["start"] = "decoder_start_token_id"

    stock_ids = {field: getattr(fast, field) for field in fields.values() if hasattr(fast, field)}
    sources: dict[str, Mapping[str, Any]] = {"AutoTokenizer": stock_ids}
    sources |= {path.name: read_json_object(path) for path in sorted(folder.glob("*config.json"))}
    for source, ids in sources.items():
        for role, field in fields.items():
            expected = getattr(ours, role)
            if role == "start" and source == GENERATION:
                expected = (record.get("generation") or {}).get("start") or expected
            given = ids.get(field, expected)
            if isinstance(given, list) and expected in given:  # several tokens that end a text
                given = expected
            if given != expected and (ours.is_trained_here or None not in (given, expected)):
                wrong.append(f"{source} says {role} is {given}, tokenizer.json {expected}")
    return Check("special tokens", not wrong, "; ".join(wrong) or "the same ids everywhere")


def generation(folder: Path, family: Family, start: int, record: Mapping[str, Any]) -> Check:
    """The stock class writes with the settings with which the model was scored."""
    if record.get("generation") is None:
        return Check("generation", True, "none was set for scoring")
    try:
        scored = Generation.model_validate_json(json.dumps(record["generation"]))
    except ValidationError as error:
        mistake = error.errors()[0]
        return Check("generation", False, f"{RECORD} says {mistake['loc']}: {mistake['msg']}")
    if family != "decoder" and scored.start is None:
        scored = scored.model_copy(update={"start": start})
    read = read_generation(folder)
    ignored = {"seed", "num_best"} | (set() if scored.sample else {"temperature", "top_k", "top_p"})
    expected, values = scored.model_dump(exclude=ignored), read.model_dump(exclude=ignored)
    wrong = [
        f"{name} was {value!r}, and {GENERATION} says {values[name]!r}"
        for name, value in expected.items()
        if values[name] != value
    ]
    return Check("generation", not wrong, "; ".join(wrong) or "the settings that were used for scoring")


def names(stock: Any, loading_info: Mapping[str, Any], record: Mapping[str, Any]) -> Check:
    """The stock class misses no tensor, and in our folders knows all of them."""
    wrong = []
    carried = {str(name) for name in record.get("carried") or ()}
    for kind, keys in sorted(loading_info.items()):
        if kind == "unexpected_keys":
            keys = set(keys) - carried
        if keys and (record or kind != "unexpected_keys"):
            wrong.append(f"{kind} {', '.join(map(str, sorted(keys)[:_SHOWN]))}")
    detail = f"{type(stock).__name__} misses none" + (" and knows all" if record else "")
    return Check("names", not wrong, "; ".join(wrong) or detail)


def settings(
    written: Mapping[str, Any], loaded: Mapping[str, Any], expected: Mapping[str, Any], all_written: bool
) -> Check:
    """Every setting has its value in config.json and in the loaded class: windows, softcaps and thetas may
    not show in short inputs. `all_written`: config.json must name each of them.
    """
    wrong = []
    fields = {name: value for name, value in flat(expected) if all_written or bears_on_logits(name)}
    for source, values in (("config.json", dict(flat(written))), ("the loaded class", dict(flat(loaded)))):
        is_file = source == "config.json"
        for name, value in fields.items():
            if name == "tie_word_embeddings" and not (all_written and is_file):
                continue  # T5's class sets it to true and ties by the weights; `tied weights` looks in memory
            if name not in values:
                if is_file and all_written:
                    wrong.append(f"{source} lacks {name}")
            elif not same(values[name], value) and (all_written or values[name] is not None):
                wrong.append(f"{source} has {name} = {values[name]!r}, not {value!r}")
    return Check("settings", not wrong, "; ".join(wrong[:_SHOWN]) or f"{len(fields)} fields by value")
