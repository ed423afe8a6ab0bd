"""The gate: is a folder what it should be, judged by the stock class itself? `publish` and `trifold verify`
both ask it.

In: a folder, ours or anybody's, and where at hand the model it was made of. Out: a Report of named checks,
one page. The checks are independent of our own tables: a wrong name shows as missing or unexpected, a wrong
source as other logits, a wrong setting by its value, however short the input. A recurrent model has no stock
class: it is asked what can be asked without one. Cost: two copies of the model and of its gradients in host
memory, in fp32, and a few hundred tokens through each (pretrain/publish/parity.py). transformers is imported
here only.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trifold.modeling.config import Family, ModelConfig
from trifold.modeling.errors import UserError
from trifold.modeling.huggingface import Found, export, recognise
from trifold.modeling.huggingface.fields import bears_on_logits, flat, lost, same, token_roles
from trifold.modeling.transformer import Transformer
from trifold.pretrain.data.tokenizer.tokenizer import Tokenizer
from trifold.pretrain.publish import parity, published_folder
from trifold.pretrain.publish.parity import Check

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


@dataclass(frozen=True)
class Report:
    """What the gate found."""

    folder: Path
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)

    @property
    def failures(self) -> str:
        """The failed checks, one clause each."""
        return "; ".join(f"{check.name}: {check.detail}" for check in self.checks if not check.ok)


@torch.no_grad()
def verify(folder: Path, reference: tuple[ModelConfig, Mapping[str, Tensor]] | None = None) -> Report:
    """Check a published folder; against `reference` (config, fp32 state dict) where given, else against the
    folder read back by us.

    Raises UserError only where there is no such folder or transformers is not installed; everything else is in
    the report.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    transformers, checks = _transformers(), []
    try:
        for check in _checks(folder, reference, transformers):
            checks.append(check)
    except UserError as reason:
        checks.append(Check("folder", False, str(reason)))
    return Report(folder, tuple(checks))


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise UserError(
            "publishing and verifying need the stock classes: pip install 'trifold[publish]'"
        ) from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _checks(
    folder: Path, reference: tuple[ModelConfig, Mapping[str, Tensor]] | None, transformers: Any
) -> Iterator[Check]:
    """The checks in order; those that an earlier failure leaves without material are not reached. Raises
    UserError: a failure too.
    """
    recorded = published_folder.read_record(folder)
    yield _files(folder, recorded)
    hf, tensors = published_folder.read_json(folder / "config.json"), published_folder.read_tensors(folder)
    yield _index(folder, tensors)
    found = recognise(hf, tensors)
    yield _tensors(found, tensors)
    tokenizer = Tokenizer.open(folder)
    special = published_folder.special_ids(tokenizer) if recorded else token_roles(hf)
    trained, state = (published_folder.recorded_config(recorded) if recorded else found.config), found.state
    dtype = hf.get("dtype") or hf.get("torch_dtype") or "float32"
    yield _dtype(dtype, tensors)
    if reference is not None:
        trained = reference[0]
        yield _weights(tensors, export(trained, reference[1], special, getattr(torch, dtype))[1])
        if dtype == "float32":
            state = dict(reference[1])
    yield _config(trained, found.config)

    try:
        fast = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if trained.cell == "attention":
            stock, info = getattr(transformers, hf["architectures"][0]).from_pretrained(
                folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
            )
    except Exception as error:  # whatever the stock classes raise is a finding about the folder
        yield Check("stock class", False, f"{type(error).__name__}: {error}")
        return
    yield _tokenizer(fast, tokenizer, trained.family, recorded)
    yield _special(folder, fast, tokenizer, trained.vocab_size)
    ours = Transformer(trained).eval()
    ours.load_state_dict(state)
    if trained.cell != "attention":
        again = Transformer(found.config).eval()
        again.load_state_dict(found.state)
        yield from parity.is_isolated(ours, again, special)
        return
    stock.eval()
    names = _names(stock, info, recorded)
    yield names
    if not names.ok:  # the stock class then has random weights
        return
    yield _settings(
        hf, stock.config.to_dict(), found.architecture.write(trained, special), all_written=bool(recorded)
    )
    yield parity.check_tied(stock, trained)
    yield parity.logits(ours, stock, special["pad"])
    if found.fresh:  # the folder has no head, so nothing else can be compared
        return
    yield parity.training(ours, stock, found.architecture, special["pad"])
    if trained.family != "encoder" and not trained.outputs:
        yield parity.greedy(ours, stock, published_folder.read_generation(folder), special)


def _files(folder: Path, record: Mapping[str, Any]) -> Check:
    if not record:
        return Check(
            "files",
            True,
            f"no {published_folder.RECORD} here: made elsewhere, nothing to compare hashes with",
        )
    recorded, found = record["files"], published_folder.measure(folder)
    wrong = [f"{name} is missing" for name in recorded.keys() - found.keys()]
    wrong += [
        f"{name} is not what was published (sha256 differs)"
        for name in recorded
        if name in found and found[name] != recorded[name]
    ]
    return Check(
        "files",
        not wrong,
        "; ".join(sorted(wrong)) or f"{len(recorded)} files as {published_folder.RECORD} says",
    )


def _index(folder: Path, tensors: Mapping[str, Tensor]) -> Check:
    """One file, or shards whose index has every tensor (else it could not be read) and their whole size;
    never both.
    """
    if not (folder / published_folder.INDEX).exists():
        return Check("index", True, "all weights are in one file")
    if (folder / "model.safetensors").exists():
        return Check(
            "index",
            False,
            f"model.safetensors lies beside {published_folder.INDEX}: which one is read differs",
        )
    said = published_folder.read_json(folder / published_folder.INDEX).get("metadata", {}).get("total_size")
    size = sum(tensor.nbytes for tensor in tensors.values())
    return Check(
        "index", said in (None, size), f"{len(tensors)} tensors of {size} bytes; the index says {said}"
    )


def _tensors(found: Found, tensors: Mapping[str, Tensor]) -> Check:
    """What Trifold reads of a folder. It drops what the architecture's class does not have; publish writes no
    such thing.
    """
    said = f"{len(tensors)} in the folder, {len(found.state)} in the model"
    said += f"; dropped: {', '.join(found.dropped)}" if found.dropped else ""
    return Check(
        "tensors", True, said + (f"; not there, and new: {', '.join(found.fresh)}" if found.fresh else "")
    )


def _config(trained: ModelConfig, read: ModelConfig) -> Check:
    """What config.json means is the model that was trained."""
    wrong = lost(trained, read)
    return Check(
        "config",
        not wrong,
        f"config.json has no {', '.join(wrong)}" if wrong else f"means the {trained.family} that was trained",
    )


def _weights(found: Mapping[str, Tensor], meant: Mapping[str, Tensor]) -> Check:
    wrong = [
        name
        for name in found.keys() | meant.keys()
        if name not in found or name not in meant or not torch.equal(found[name], meant[name])
    ]
    return Check(
        "weights",
        not wrong,
        f"{', '.join(sorted(wrong)[:4])} differ from the trained ones"
        if wrong
        else "bit for bit the trained ones",
    )


def _dtype(said: str, tensors: Mapping[str, Tensor]) -> Check:
    wrong = [
        f"{name} is {tensor.dtype}"
        for name, tensor in tensors.items()
        if str(tensor.dtype) != f"torch.{said}"
    ]
    return Check(
        "dtype",
        not wrong,
        f"config.json says {said}, but {', '.join(wrong[:4])}" if wrong else f"{said}, as config.json says",
    )


def _tokenizer(fast: Any, tokenizer: Tokenizer, family: Family, recorded: Mapping[str, Any]) -> Check:
    """The stock tokenizer gives the ids that training read, and in folders of ours the marks around them; our
    own loses nothing.
    """
    wrong = []
    before, after = tokenizer.special_prefix_suffix(family)
    for line, array in zip(HARD_LINES, tokenizer.encode_batch(HARD_LINES), strict=True):
        ids = [int(i) for i in array]
        if fast(line, add_special_tokens=False)["input_ids"] != ids:
            wrong.append(f"{line[:20]!r} is encoded otherwise")
        if fast.decode(ids, clean_up_tokenization_spaces=False) != tokenizer.decode(ids):
            wrong.append(f"{line[:20]!r} is decoded otherwise")
        if recorded and fast(line)["input_ids"] != [*before, *ids, *after]:
            wrong.append(f"{line[:20]!r} has other begin and end marks than a {family} trains with")
        if tokenizer.is_trained_here and tokenizer.decode(ids) != line:
            wrong.append(f"{line[:20]!r} does not come back")
    if recorded and recorded["fingerprints"]["tokenizer"] != tokenizer.fingerprint:
        wrong.append("its fingerprint is not the one the model was trained with")
    return Check(
        "tokenizer",
        not wrong,
        "; ".join(wrong[:4]) or f"{len(HARD_LINES)} hard lines encoded and decoded alike",
    )


def _special(folder: Path, fast: Any, tokenizer: Tokenizer, vocab_size: int) -> Check:
    """Each file that names a special token means the same id. With tokenizers made elsewhere a role may have
    no name.
    """
    wrong = (
        [f"{tokenizer.vocab_size} pieces, but {vocab_size} rows of embeddings"]
        if tokenizer.vocab_size > vocab_size
        else []
    )
    fields = {mark: f"{mark}_token_id" for mark in ("pad", "bos", "eos", "unk", "mask")} | {
        "start": "decoder_start_token_id"
    }
    named = {
        "AutoTokenizer": {field: getattr(fast, field) for field in fields.values() if hasattr(fast, field)}
    }
    named |= {path.name: published_folder.read_json(path) for path in folder.glob("*config.json")}
    for where, ids in named.items():
        for mark, field in fields.items():
            right = getattr(tokenizer, mark)
            said = ids.get(field, right)
            if said != right and (tokenizer.is_trained_here or None not in (said, right)):
                wrong.append(f"{where} says {mark} is {said}, tokenizer.json {right}")
    return Check("special tokens", not wrong, "; ".join(wrong) or "the same ids everywhere")


def _names(stock: Any, info: Mapping[str, Any], recorded: Mapping[str, Any]) -> Check:
    """The stock class finds all it wants and knows all there is; of what was made elsewhere it may leave out
    what we do.
    """
    kinds = {
        kind: names
        for kind, names in sorted(info.items())
        if names and (recorded or kind != "unexpected_keys")
    }
    wrong = [f"{kind} {', '.join(map(str, sorted(names)[:4]))}" for kind, names in kinds.items()]
    return Check(
        "names",
        not wrong,
        "; ".join(wrong) or f"{type(stock).__name__} misses none" + (" and knows all" if recorded else ""),
    )


def _settings(
    hf: Mapping[str, Any], loaded: Mapping[str, Any], meant: Mapping[str, Any], all_written: bool
) -> Check:
    """Every setting by its value, in the file and in the loaded class: windows, softcaps and thetas may not
    show in short inputs.
    """
    wrong = []
    fields = {name: value for name, value in flat(meant) if all_written or bears_on_logits(name)}
    for where, have in (("config.json", dict(flat(hf))), ("the loaded class", dict(flat(loaded)))):
        for name, value in fields.items():
            if name == "tie_word_embeddings" and not (all_written and where == "config.json"):
                continue  # T5's class sets it to true and ties by the weights; `tied weights` looks in memory
            if name not in have and where == "config.json" and all_written:
                wrong.append(f"{where} lacks {name}")
            elif name in have and not same(have[name], value) and (all_written or have[name] is not None):
                wrong.append(f"{where} has {name} = {have[name]!r}, not {value!r}")
    return Check("settings", not wrong, "; ".join(wrong[:4]) or f"{len(fields)} fields by value")
