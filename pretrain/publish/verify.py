"""Is a folder what it should be? The stock class itself decides. `publish` and `trifold verify` both ask
here.

A folder, ours or anybody's, comes in, and where known the model that it was made from; a Report of named
checks goes out, one page. The checks do not rely on our own name tables: a wrong name shows as a missing or
unexpected tensor, a wrong source as other logits, a wrong setting by its value, however short the input. For
a recurrent model there is no stock class: it is read back and compared with itself. Cost: two copies of the
model and of its gradients in host memory, in fp32, and a few hundred tokens through each. transformers is
imported here only.
"""

from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trifold.modeling.config import ModelConfig
from trifold.modeling.errors import UserError
from trifold.modeling.huggingface import ImportedModel, export
from trifold.modeling.huggingface.fields import token_roles
from trifold.modeling.transformer import Transformer
from trifold.pretrain.data.tokenizer.tokenizer import Tokenizer, is_panic
from trifold.pretrain.publish import file_checks, parity, published_folder
from trifold.pretrain.publish.parity import Check
from trifold.pretrain.publish.weights import read_tensors
from trifold.pretrain.storage.foreign_files import check_folder

Reference = tuple[ModelConfig, Mapping[str, Tensor]]  # a model's config and its fp32 state dict


@dataclass(frozen=True)
class Report:
    """The result of all checks."""

    folder: Path
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)

    @property
    def failures(self) -> str:
        """The failed checks, one clause each."""
        return "; ".join(f"{check.name}: {check.detail}" for check in self.checks if not check.ok)


@dataclass(frozen=True)
class _Contents:
    """A folder as Trifold reads it."""

    folder: Path
    record: Mapping[str, Any]  # trifold.json; empty for a folder made elsewhere
    stock_config: Mapping[str, Any]  # config.json
    tensors: Mapping[str, Tensor]  # by stock name
    found: ImportedModel
    tokenizer: Tokenizer
    special: Mapping[str, int]
    trained: (
        ModelConfig  # the model that was trained: the reference's, else trifold.json's, else config.json's
    )
    state: Mapping[str, Tensor]  # its weights, as the folder's dtype rounds them


@torch.no_grad()
def verify(folder: Path, reference: Reference | None = None) -> Report:
    """Check a published folder against `reference` (config, fp32 state dict), or without one against the
    model that Trifold reads from the folder.

    Raises UserError only where there is no such folder or transformers is not installed; everything else is
    in the report.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    transformers = _import_transformers()
    checks: list[Check] = []
    try:
        for check in _checks(folder, reference, transformers):
            checks.append(check)
    except UserError as reason:
        checks.append(Check("folder", False, str(reason)))
    return Report(folder, tuple(checks))


def _import_transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise UserError(
            "publishing and verifying need the stock classes: pip install 'trifold[publish]'"
        ) from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _checks(folder: Path, reference: Reference | None, transformers: Any) -> Iterator[Check]:
    """All checks in order; those for which an earlier failure leaves no material are left out. A UserError is
    a failure too.
    """
    check_folder(folder)
    contents = yield from _read_contents(folder, reference)
    try:
        yield from _runtime_checks(contents, transformers)
    except UserError:
        raise
    except BaseException as error:  # whatever the stock classes raise is a finding about the folder
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        message = " ".join(str(error).split())  # transformers' span several lines
        yield Check("stock class", False, f"{type(error).__name__}: {message}")


def _runtime_checks(contents: _Contents, transformers: Any) -> Iterator[Check]:
    """The checks that load the stock tokenizer and the stock class."""
    folder, record, trained = contents.folder, contents.record, contents.trained
    fast = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    stock, loading_info = _load_stock(contents, transformers)

    family = published_folder.tokenizer_family(trained)
    yield file_checks.tokenizer(fast, contents.tokenizer, family, record)
    if trained.spans and record:
        yield file_checks.pair(fast, contents.tokenizer, trained.token_types)
    yield file_checks.special_tokens(folder, fast, contents.tokenizer, trained.vocab_size, record)
    if trained.family != "encoder" and not trained.outputs:
        yield file_checks.generation(folder, trained.family, contents.special["start"], record)

    ours = _build(trained, contents.state)
    if stock is None:
        again = _build(contents.found.config, contents.found.state)
        yield from parity.reload(ours, again, contents.special)
    else:
        yield from _stock_checks(contents, ours, stock.eval(), loading_info)


def _read_contents(folder: Path, reference: Reference | None) -> Generator[Check, None, _Contents]:
    """Yield the checks of the files alone; return what was read."""
    record = published_folder.read_record(folder)
    yield file_checks.hashes(folder, record)
    stock_config, tensors = published_folder.read_config(folder), read_tensors(folder)
    yield file_checks.index(folder, tensors)
    found = published_folder.recognise_folder(folder, stock_config, tensors)
    yield file_checks.tensors(found, tensors)

    tokenizer = Tokenizer.open(folder)
    special = published_folder.special_ids(tokenizer) if record else token_roles(stock_config)
    trained = published_folder.recorded_config(record) if record else found.config
    state: Mapping[str, Tensor] = found.state
    dtype = stock_config.get("dtype") or stock_config.get("torch_dtype") or "float32"
    yield file_checks.dtype(dtype, tensors)
    if reference is not None:
        trained = reference[0]
        expected = export(trained, reference[1], special, getattr(torch, dtype))[1]
        yield file_checks.weights(tensors, expected, record.get("carried") or ())
        if dtype == "float32":
            state = dict(reference[1])
    yield file_checks.config(trained, found.config)
    return _Contents(folder, record, stock_config, tensors, found, tokenizer, special, trained, state)


def _load_stock(contents: _Contents, transformers: Any) -> tuple[Any, Mapping[str, Any]]:
    """(the stock model in fp32, what it says about missing and unexpected tensors); (None, {}) for a
    recurrent model.
    """
    if contents.trained.cell != "attention":
        return None, {}
    stock_class = getattr(transformers, contents.stock_config["architectures"][0])
    stock, info = stock_class.from_pretrained(
        contents.folder,
        dtype=torch.float32,
        output_loading_info=True,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
    )
    return stock, info


def _stock_checks(
    contents: _Contents, ours: Transformer, stock: Any, loading_info: Mapping[str, Any]
) -> Iterator[Check]:
    """Ours beside the stock model: names, settings, and what both compute."""
    found, record, pad = contents.found, contents.record, contents.special["pad"]
    names = file_checks.names(stock, loading_info, record)
    yield names
    if not names.ok:  # the stock model then has random weights
        return

    expected = found.architecture.write(contents.trained, contents.special)
    loaded = stock.config.to_dict()
    yield file_checks.settings(contents.stock_config, loaded, expected, all_written=bool(record))
    yield parity.tied_weights(stock, contents.trained)
    yield parity.logits(ours, stock, pad)
    if found.fresh:  # the folder has no head, so nothing else can be compared
        return
    yield parity.training(ours, stock, found.architecture, pad)
    if contents.trained.family != "encoder" and not contents.trained.outputs:
        generation = published_folder.read_generation(contents.folder)
        yield parity.greedy(ours, stock, generation, contents.special)


def _build(config: ModelConfig, state: Mapping[str, Tensor]) -> Transformer:
    model = Transformer(config).eval()
    model.load_state_dict(state)
    return model
