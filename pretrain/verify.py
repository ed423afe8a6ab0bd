"""The gate: is a published folder what it should be, judged by the stock class itself? `publish` and `trifold verify` both ask it.

In: a folder, and where at hand the model it was made of. Out: a Report of named checks, one page. Each check is independent of our own
tables: a wrong name shows as missing or unexpected, a wrong source as other logits, a wrong setting by its value, however short the input.
A recurrent model has no stock class: it is asked what can be asked without one.
Cost: two copies of the model in host memory, in fp32, and a few hundred tokens through each. transformers is imported in this file only.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from modeling.batch import Batch
from modeling.config import Family, Generation, ModelConfig, Refused
from modeling.generate import generate
from modeling.huggingface import export, express, restore
from modeling.huggingface.fields import flat, lost, same
from modeling.transformer import Transformer
from pretrain import published
from pretrain.tokenizer import Tokenizer

TOLERANCE = 1e-5  # of the largest logit (at least 1): ten times what fp32 rounding gives, a thousandth of what a softcap of 50 does
NEW_TOKENS = 20

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


class Check(NamedTuple):
    """One thing the gate looked at."""

    name: str
    ok: bool
    detail: str


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
    """Check a published folder; against `reference` (config, fp32 state dict) where given, else against the folder read back by us.

    Raises Refused only where there is no such folder or transformers is not installed; everything else is in the report.
    """
    if not folder.is_dir():
        raise Refused(f"there is no folder {folder}")
    transformers, checks = _transformers(), []
    try:
        for check in _checks(folder, reference, transformers):
            checks.append(check)
    except Refused as reason:
        checks.append(Check("folder", False, str(reason)))
    return Report(folder, tuple(checks))


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise Refused("publishing and verifying need the stock classes: pip install 'trifold[publish]'") from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _checks(folder: Path, reference: tuple[ModelConfig, Mapping[str, Tensor]] | None, transformers: Any) -> Iterator[Check]:
    """The checks in order; those that an earlier failure leaves without material are not reached. Raises Refused: a failure too."""
    recorded = published.read_record(folder)
    yield _files(folder, recorded)
    hf, tensors = published.read_json(folder / "config.json"), published.read_tensors(folder)
    config, read = restore(hf, tensors)
    state = read
    tokenizer = Tokenizer.open(folder)
    special = published.special_ids(tokenizer)
    trained = published.recorded_config(recorded) if recorded else config
    dtype = hf.get("dtype") or hf.get("torch_dtype") or "float32"
    yield _dtype(dtype, tensors)
    if reference is not None:
        trained = reference[0]
        yield _weights(tensors, export(trained, reference[1], special, getattr(torch, dtype))[1])
        if dtype == "float32":
            state = dict(reference[1])
    yield _config(trained, config)

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
        yield from _without_stock_class(ours, config, read, special)
        return
    stock.eval()
    names = _names(stock, info)
    yield names
    if not names.ok:  # the stock class then has random weights
        return
    yield _settings(hf, stock.config.to_dict(), express(trained, special)[1], all_written=bool(recorded))
    yield _tied(stock, trained)
    yield _logits(ours, stock, special["pad"])
    if trained.family != "encoder" and not trained.outputs:
        yield _greedy(ours, stock, special)


def _files(folder: Path, record: Mapping[str, Any]) -> Check:
    if not record:
        return Check("files", True, f"no {published.RECORD} here: made elsewhere, nothing to compare hashes with")
    recorded, found = record["files"], published.measure(folder)
    wrong = [f"{name} is missing" for name in recorded.keys() - found.keys()]
    wrong += [f"{name} is not what was published (sha256 differs)" for name in recorded if name in found and found[name] != recorded[name]]
    return Check("files", not wrong, "; ".join(sorted(wrong)) or f"{len(recorded)} files as {published.RECORD} says")


def _config(trained: ModelConfig, read: ModelConfig) -> Check:
    """What config.json means is the model that was trained."""
    wrong = lost(trained, read)
    return Check("config", not wrong, f"config.json has no {', '.join(wrong)}" if wrong else f"means the {trained.family} that was trained")


def _weights(found: Mapping[str, Tensor], meant: Mapping[str, Tensor]) -> Check:
    wrong = [
        name for name in found.keys() | meant.keys() if name not in found or name not in meant or not torch.equal(found[name], meant[name])
    ]
    return Check(
        "weights", not wrong, f"{', '.join(sorted(wrong)[:4])} differ from the trained ones" if wrong else "bit for bit the trained ones"
    )


def _dtype(said: str, tensors: Mapping[str, Tensor]) -> Check:
    wrong = [f"{name} is {tensor.dtype}" for name, tensor in tensors.items() if str(tensor.dtype) != f"torch.{said}"]
    return Check("dtype", not wrong, f"config.json says {said}, but {', '.join(wrong[:4])}" if wrong else f"{said}, as config.json says")


def _tokenizer(fast: Any, tokenizer: Tokenizer, family: Family, recorded: Mapping[str, Any]) -> Check:
    """The stock tokenizer gives the ids that training read; ours, whose fingerprint is recorded, also adds the marks and loses nothing."""
    wrong = []
    end = [] if family == "decoder" else [tokenizer.eos]
    for line, array in zip(HARD_LINES, tokenizer.encode_batch(HARD_LINES), strict=True):
        ids = [int(i) for i in array]
        if fast(line, add_special_tokens=False)["input_ids"] != ids:
            wrong.append(f"{line[:20]!r} is encoded otherwise")
        if fast.decode(ids) != tokenizer.decode(ids):
            wrong.append(f"{line[:20]!r} is decoded otherwise")
        if recorded and fast(line)["input_ids"] != [tokenizer.bos, *ids, *end]:
            wrong.append(f"{line[:20]!r} has other begin and end marks than a {family} trains with")
        if recorded and tokenizer.decode(ids) != line:
            wrong.append(f"{line[:20]!r} does not come back")
    if recorded and recorded["fingerprints"]["tokenizer"] != tokenizer.fingerprint:
        wrong.append("its fingerprint is not the one the model was trained with")
    return Check("tokenizer", not wrong, "; ".join(wrong[:4]) or f"{len(HARD_LINES)} hard lines encoded and decoded alike")


def _special(folder: Path, fast: Any, tokenizer: Tokenizer, vocab_size: int) -> Check:
    """Each file that names a special token means the same id."""
    wrong = [f"{tokenizer.vocab_size} pieces, but {vocab_size} rows of embeddings"] if tokenizer.vocab_size > vocab_size else []
    marks = ("pad", "bos", "eos", "unk", "mask")
    named = {"AutoTokenizer": {f"{mark}_token_id": getattr(fast, f"{mark}_token_id") for mark in marks}}
    named |= {path.name: published.read_json(path) for path in folder.glob("*config.json")}
    for where, ids in named.items():
        for mark in marks:
            right = getattr(tokenizer, mark)
            found = ids.get(f"{mark}_token_id", right)
            if found != right:
                wrong.append(f"{where} says {mark} is {found}, tokenizer.json {right}")
    return Check("special tokens", not wrong, "; ".join(wrong) or "the same ids everywhere")


def _names(stock: Any, info: Mapping[str, Any]) -> Check:
    wrong = [f"{kind} {', '.join(map(str, sorted(names)[:4]))}" for kind, names in sorted(info.items()) if names]
    return Check("names", not wrong, "; ".join(wrong) or f"{type(stock).__name__} misses none and knows all")


def _settings(hf: Mapping[str, Any], loaded: Mapping[str, Any], meant: Mapping[str, Any], all_written: bool) -> Check:
    """Every setting by its value, in the file and in the loaded class: windows, softcaps and thetas may not show in short inputs."""
    wrong = []
    for where, have in (("config.json", dict(flat(hf))), ("the loaded class", dict(flat(loaded)))):
        for name, value in flat(meant):
            if name not in have and where == "config.json" and all_written:
                wrong.append(f"{where} lacks {name}")
            elif name in have and not same(have[name], value):
                wrong.append(f"{where} has {name} = {have[name]!r}, not {value!r}")
    return Check("settings", not wrong, "; ".join(wrong[:4]) or f"{len(list(flat(meant)))} fields by value")


def _tied(stock: Any, config: ModelConfig) -> Check:
    if config.outputs:
        return Check("tied weights", True, "a task's head shares no weights")
    head, embed = stock.get_output_embeddings().weight, stock.get_input_embeddings().weight
    if config.family == "encoder-decoder":  # the stock class ties the head to the decoder's embeddings
        embed = stock.get_decoder().get_input_embeddings().weight
    tied = head.data_ptr() == embed.data_ptr()
    said = f"the head and the embeddings are {'one tensor' if tied else 'two tensors'}"
    return Check("tied weights", tied == config.tie_embeddings, said)


def _logits(ours: Transformer, stock: Any, pad: int) -> Check:
    """The largest difference over several lengths, the longest past the local windows."""
    config, worst, largest = ours.config, 0.0, 1.0
    lengths = sorted({min(n, config.max_positions) for n in (1, 7, max(48, 3 * config.local_window))})
    for length in lengths:
        tokens, source = _tokens(config, pad, length), _tokens(config, pad, length + 2)
        logits, out = _ours(ours, tokens, source), stock(**_inputs(config, tokens, source))
        other = torch.stack([out.start_logits, out.end_logits], dim=-1) if config.spans else out.logits
        worst, largest = max(worst, (logits - other).abs().max().item()), max(largest, logits.abs().max().item())
    said = f"differ by at most {worst:.1e} at lengths {lengths} (allowed: {TOLERANCE * largest:.1e}, logits reach {largest:.1f})"
    return Check("logits", worst <= TOLERANCE * largest, said)


def _greedy(ours: Transformer, stock: Any, special: Mapping[str, int]) -> Check:
    """The stock class with its cache, and ours with ours."""
    config = ours.config
    prompt = _tokens(config, special["pad"], min(9, config.max_positions - 1))[:1]
    new = min(NEW_TOKENS, config.max_positions - prompt.shape[1])
    other = stock.generate(prompt, max_new_tokens=new, do_sample=False, num_beams=1)[0].tolist()
    other = other[prompt.shape[1] if config.family == "decoder" else 1 :]
    mine = generate(ours, prompt.tolist(), Generation(max_new=new), bos=special["bos"], eos=special["eos"], pad=special["pad"])[0]
    return Check("greedy", mine == other, f"{len(other)} tokens with the cache" + ("" if mine == other else f": {other}, not {mine}"))


def _tokens(config: ModelConfig, pad: int, length: int) -> Tensor:
    """Two rows of arbitrary tokens, the same each time; no padding, which the stock classes would mask."""
    tokens = torch.randint(0, config.vocab_size, (2, length), generator=torch.Generator().manual_seed(length))
    return torch.where(tokens == pad, (pad + 1) % config.vocab_size, tokens)


def _ours(model: Transformer, tokens: Tensor, source: Tensor) -> Tensor:
    ones = torch.ones_like
    if model.config.family != "encoder-decoder":
        return model.logits(Batch(tokens, ones(tokens), tokens))
    return model.logits(Batch(tokens, ones(tokens), tokens, source, ones(source)))


def _without_stock_class(ours: Transformer, config: ModelConfig, read: Mapping[str, Tensor], special: Mapping[str, int]) -> Iterator[Check]:
    """What can be asked of a model that no other library knows: read back, does it say the same, and does it write what it says?"""
    again = Transformer(config).eval()
    again.load_state_dict(read)
    tokens, source = _tokens(config, special["pad"], 48), _tokens(config, special["pad"], 50)
    same = torch.equal(_ours(again, tokens, source), _ours(ours, tokens, source))
    yield Check("reload", same, f"read back, its logits are {'' if same else 'not '}the same to the last bit; there is no stock class")
    if config.family == "encoder" or config.outputs:
        return
    new = NEW_TOKENS
    written = generate(again, source[:1].tolist(), Generation(max_new=new), bos=special["bos"], eos=-1, pad=special["pad"])[0]
    prompt = source[0].tolist() if config.family == "decoder" else [special["bos"]]
    row = torch.tensor([prompt + written[:-1]])
    said = again.logits(Batch(row, None, row, None if config.family == "decoder" else source[:1]))[0, -new:].argmax(-1).tolist()
    yield Check("greedy", written == said, f"{new} tokens with the cache" + ("" if written == said else f": {written}, not {said}"))


def _inputs(config: ModelConfig, tokens: Tensor, source: Tensor) -> dict[str, Tensor]:
    return {"input_ids": source, "decoder_input_ids": tokens} if config.family == "encoder-decoder" else {"input_ids": tokens}
