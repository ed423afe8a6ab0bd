"""What a folder holds that Trifold neither trains nor writes, carried from the folder that a run starts from
to the folder that it publishes.

    RUN/carried/           the files: sentence-transformers' modules, chat templates, other tokenizer files,
    licences RUN/carried.safetensors  tensors of heads that Trifold does not have (poolers)

`keep` copies them when a run is prepared, because the folder may be gone when it is published; `restore` puts
them into the published folder. Weights of other frameworks and Python files are left behind.
"""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from trifold.modeling.huggingface import ImportedModel
from trifold.pretrain.publish import weights
from trifold.pretrain.publish.published_folder import (
    CARD,
    CONFIG,
    GENERATION,
    RECORD,
    read_config,
    recognise_folder,
)
from trifold.pretrain.storage.atomic import replace_folder
from trifold.pretrain.storage.foreign_files import is_plain_name
from trifold.pretrain.storage.json_files import read_json, read_json_object

_TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "tokenizer.model"}
_WRITTEN = {CARD, CONFIG, GENERATION, RECORD, weights.INDEX, *_TOKENIZER}
_SUFFIXES = {".json", ".jinja", ".txt", ".model"}
_NAMES = {"LICENSE", "NOTICE"}
_HEADS = ("pooler.", "seq_relationship.")
_MAX_BYTES = 64 << 20
_FOLDER, _TENSORS = "carried", "carried.safetensors"


def carried_files(source: Path) -> list[Path]:
    """The files of a folder, by their names in it, that a run carries along."""
    return [path.relative_to(source) for path in _candidates(source) if path.stat().st_size <= _MAX_BYTES]


def carried_tensors(found: ImportedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of heads that Trifold does not have, by the names that a class with a head gives them: a
    bare class saves `pooler.dense.weight` for `bert.pooler.dense.weight`.
    """
    heads = [name for name in found.dropped if any(head in name for head in _HEADS)]
    bare_names = {name: name.removeprefix(found.architecture.prefix) for name in heads}
    return {name: tensors[name if name in tensors else bare_names[name]] for name in heads}


def keep(source: Path, run: Path) -> None:
    """Copy into a run, once, what its initial folder holds beside the model."""
    if (run / _FOLDER).exists():
        return
    run.mkdir(parents=True, exist_ok=True)
    tensors = weights.read_tensors(source)
    found = recognise_folder(source, read_config(source), tensors)
    if heads := carried_tensors(found, tensors):
        weights.save_tensors(run / _TENSORS, heads)
    with replace_folder(run / _FOLDER) as folder:
        generation = [Path(GENERATION)] if (source / GENERATION).exists() else []
        for name in carried_files(source) + generation:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, folder / name)


def restore(run: Path, folder: Path) -> None:
    """Copy into a published folder what its run carried along; no file that is there already is replaced."""
    source = run / _FOLDER
    for path in sorted(source.rglob("*")):
        target = folder / path.relative_to(source)
        if path.is_file() and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def kept_tensors(run: Path) -> dict[str, Tensor]:
    """The tensors that a run carried along."""
    path = run / _TENSORS
    return load_file(path) if path.exists() else {}


def kept_generation(run: Path) -> dict[str, Any]:
    """The generation settings of the folder that a run started from."""
    path = run / _FOLDER / GENERATION
    return read_json_object(path) if path.exists() else {}


def _candidates(source: Path) -> Iterator[Path]:
    for path in sorted(source.iterdir()):
        is_text = path.suffix in _SUFFIXES or path.name in _NAMES
        if path.is_file() and is_text and path.name not in _WRITTEN and not path.name.startswith("."):
            yield path
    for name in _module_folders(source):
        for path in sorted((source / name).iterdir()):
            if path.is_file() and path.suffix in {*_SUFFIXES, ".safetensors"}:
                yield path


def _module_folders(source: Path) -> list[str]:
    """The sub-folders that belong to a model: sentence-transformers' modules, and chat templates."""
    names = ["additional_chat_templates"]
    if (source / "modules.json").exists():
        modules = read_json(source / "modules.json")
        for module in modules if isinstance(modules, list) else ():
            name = module.get("path") if isinstance(module, dict) else None
            if isinstance(name, str) and is_plain_name(name):
                names.append(name)
    return [name for name in names if (source / name).is_dir()]
