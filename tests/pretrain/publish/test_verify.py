"""`verify` notices every single mistake: each row of each name table wrong, each setting wrong, files changed
after publishing.
"""

import dataclasses
import functools
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.published import MODELS, copy_published, failed, tokenizer, update_hashes, write_published
from trifold.modeling import huggingface
from trifold.modeling.config import ModelConfig
from trifold.modeling.errors import UserError
from trifold.modeling.generation.generate import generate
from trifold.modeling.huggingface.fields import flat
from trifold.modeling.huggingface.tables import Line, gradients, spell
from trifold.pretrain.publish import file_checks, parity, published_folder, weights
from trifold.pretrain.publish.parity import Check
from trifold.pretrain.publish.verify import verify
from trifold.pretrain.storage.json_files import read_json_object, write_json

pytest.importorskip("transformers")
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_layers": 1},
    "modernbert": {"num_layers": 2, "global_every": 2},
    "t5gemma": {"num_layers": 1},
}
FAMILIES |= {
    name: {"num_layers": 1}
    for name in ("gpt2", "bert", "roberta", "t5", "t5, tied, relu", "bart", "mbart", "m2m100")
}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function from a model's name to a fresh published folder of it, and its (config, state)."""

    def make(
        name: str, dtype: torch.dtype = torch.float32, **changes: Any
    ) -> tuple[Path, tuple[ModelConfig, Any]]:
        folder = tmp_path_factory.mktemp("published")
        return folder, copy_published(folder, name, dtype, **changes)

    return make


@pytest.mark.parametrize("name", MODELS)
def test_a_sound_folder_passes(name: str, folder_of: Any) -> None:
    folder, (config, state) = folder_of(name)
    reports = [verify(folder, (config, state))]
    if name in FAMILIES:  # also without the model that it was made from
        reports.append(verify(folder))
    for report in reports:
        assert report.ok, report.failures
        names = [check.name for check in report.checks]
        assert {
            *"files index tensors config dtype tokenizer names settings logits training".split(),
            "special tokens",
            "tied weights",
        } <= set(names)
        assert ("greedy" in names) == (config.family != "encoder" and not config.outputs)


@pytest.mark.parametrize("name", ["llama", "modernbert", "t5gemma", "bert", "t5"])
def test_a_sound_bf16_folder_passes(name: str, folder_of: Any) -> None:
    folder, reference = folder_of(name, torch.bfloat16)
    for report in (verify(folder, reference), verify(folder)):
        assert report.ok, report.failures


def mutations(table: str, shapes: Mapping[str, torch.Size]) -> Iterator[tuple[str, str]]:
    """(what was done, the table): each row renamed, its operation dropped, its sources swapped, its source
    swapped with that of a row of equal shape.
    """
    # what is never written ("~") cannot be written wrongly
    rows = [row for row in table.splitlines() if row.strip() and "~ =" not in row]

    def with_rows(changes: dict[int, str]) -> str:
        return "\n".join(changes.get(i, row) for i, row in enumerate(rows))

    def shape(source: str) -> object:
        name = source.partition(" | ")[0].partition(",")[0].replace("{p}", "weight")
        in_layers = "{i}" in name
        return in_layers, shapes.get(name.replace("{i}", "1"), shapes.get(name.replace("{i}", "0")))

    for i, row in enumerate(rows):
        stock, _, source = row.partition(" = ")
        yield f"renamed: {row}", with_rows({i: f"wrong.{row}"})
        if " | " in source:
            yield f"operation dropped: {row}", with_rows({i: row.partition(" | ")[0]})
        if ", " in source:
            first, second, *rest = source.split(", ")
            swapped = f"{stock} = {', '.join([second, first, *rest])}"
            yield f"sources swapped: {row}", with_rows({i: swapped})
        for j in range(i + 1, len(rows)):
            other_stock, _, other = rows[j].partition(" = ")
            if shape(source) == shape(other) and source != other:
                both = {i: f"{stock} = {other}", j: f"{other_stock} = {source}"}
                yield f"swapped: {row} and {rows[j]}", with_rows(both)
                break


def _every_nth() -> list[Any]:
    """Each third mutation of Llama's table, each ninth of the others; a proof tries all."""
    proofs = [pytest.param(name, 1, marks=pytest.mark.proof) for name in FAMILIES]
    return [*((name, 3 if name == "llama" else 9) for name in FAMILIES), *proofs]


@pytest.mark.parametrize(("name", "every"), _every_nth())
def test_every_mutation_of_every_row_is_caught(
    name: str, every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wrong table is used for writing and for reading back, as a real mistake would be."""
    changes = FAMILIES[name]
    if "," not in name:  # the variant whose head has its own weights
        variants = [other for other in MODELS if other.split(",")[0] == name]
        name = next(other for other in variants if not MODELS[other].tie_embeddings)
    config, state = copy_published(tmp_path / "right", name, **changes)
    assert verify(tmp_path / "right", (config, state)).ok
    right = huggingface.express(config, published_folder.special_ids(tokenizer()))[0]
    position = huggingface.ARCHITECTURES.index(right)
    monkeypatch.setattr(parity, "NEW_TOKENS", 2)
    seen_by = Counter[str]()

    def written(table: str) -> list[Line]:
        return [line for line in spell(table, config) if line.written(state)]

    shapes = {key: tensor.shape for key, tensor in state.items()}
    of_this_model = [
        (what, table)
        for what, table in mutations(right.table, shapes)
        if written(table) != written(right.table)
    ]
    for i, (what, table) in enumerate(of_this_model[::every]):
        wrong = [*huggingface.ARCHITECTURES]
        wrong[position] = dataclasses.replace(right, table=table)
        monkeypatch.setattr(huggingface, "ARCHITECTURES", tuple(wrong))
        try:
            write_published(tmp_path / str(i), config, state)
            failures = failed(verify(tmp_path / str(i), (config, state)))
        except UserError as reason:  # two rows of which one is optional
            assert "the model and its name table do not match" in str(reason)
            failures = {"export"}
        assert failures, what
        seen_by[f"{what.partition(':')[0]}, seen by {' and '.join(sorted(failures))}"] += 1
    rows = sum(count for what, count in seen_by.items() if what.startswith("renamed"))
    print(
        f"{name}: {rows} rows, {sum(seen_by.values())} mutations, all caught", *seen_by.items(), sep="\n    "
    )
    assert rows


def other_values(value: Any) -> Iterator[Any]:
    """Values of the same kind that are not this one."""
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int | float):
        yield value + 1
    elif isinstance(value, str):
        yield {"silu": "gelu", "gelu": "silu", "gelu_pytorch_tanh": "gelu", "float32": "bfloat16"}.get(
            value, "other"
        )
    elif isinstance(value, list):
        yield ["sliding_attention" if item == "full_attention" else "full_attention" for item in value]
    else:
        yield 50.0  # a softcap where there was none


def changed_fields(hf: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(what was done, config.json) of every field, nested ones too: changed in every way, and left out."""
    for path, value in flat(hf):
        *outer, last = path.split(".")
        for change in (*other_values(value), "left out"):
            copy = json.loads(json.dumps(hf))
            inner = functools.reduce(dict.__getitem__, outer, copy)
            inner[last] = change
            if change == "left out":
                del inner[last]
            yield f"{path}: {change}", copy


@pytest.mark.parametrize(
    ("name", "every"),
    [
        *((name, 4) for name in ("llama", "modernbert", "t5gemma", "bert", "bart")),
        *(pytest.param(name, 1, marks=pytest.mark.proof) for name in FAMILIES if name != "t5, tied, relu"),
    ],
)
def test_every_changed_or_missing_setting_is_caught(
    name: str, every: int, folder_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its value, hashes up to date, without the model at hand: trifold.json says what was trained."""
    folder, _ = folder_of(name, **FAMILIES[name])
    config_json = folder / "config.json"
    # What takes longest is left out here; it is not needed.
    for check in ("logits", "greedy", "training"):
        monkeypatch.setattr(parity, check, lambda *_, check=check: Check(check, True, ""))
    monkeypatch.setattr(file_checks, "tokenizer", lambda *_: Check("tokenizer", True, ""))
    right = read_json_object(config_json)
    missed = []
    changes = [change for change in changed_fields(right) if change[0] != "dtype: left out"]
    for what, wrong in changes[::every]:
        write_json(config_json, wrong)
        update_hashes(folder)
        missed += [] if failed(verify(folder)) else [what]
    print(f"{name}: {len(changes[::every])} changes of config.json, all caught but {missed}")
    assert not missed


def test_without_a_dtype_stock_classes_take_fp32(folder_of: Any) -> None:
    folder, _ = folder_of("llama")
    config = read_json_object(folder / "config.json")
    write_json(folder / "config.json", {name: value for name, value in config.items() if name != "dtype"})
    update_hashes(folder)
    assert verify(folder).ok


@pytest.mark.parametrize("sharded", [False, True])
def test_a_renamed_weight_is_named(sharded: bool, folder_of: Any) -> None:
    folder, _ = folder_of("llama")
    tensors = weights.read_tensors(folder)
    tensors["model.norm.wait"] = tensors.pop("model.norm.weight")
    if sharded:
        (folder / "model.safetensors").unlink()
    weights.write_tensors(folder, tensors, 20_000 if sharded else 10**9)
    update_hashes(folder)
    report = verify(folder)
    assert (
        failed(report) == {"folder"}
        and "missing model.norm.weight; unexpected model.norm.wait" in report.failures
    )


def test_a_flipped_byte_is_noticed_and_its_file_named(folder_of: Any) -> None:
    folder, reference = folder_of("llama")
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-3] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    assert "model.safetensors is not what was published" in verify(folder).failures
    update_hashes(folder)
    assert (
        "weights: lm_head" in verify(folder, reference).failures
        or "weights: model." in verify(folder, reference).failures
    )


def write_nan(path: Path) -> None:
    tensors = load_file(path)
    tensors["model.layers.0.input_layernorm.weight"][3] = math.nan
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        (
            "model.safetensors",
            lambda path: path.write_bytes(path.read_bytes()[:-7]),
            r"model\.safetensors is damaged",
        ),
        (
            "model.safetensors",
            lambda path: path.rename(path.with_name("pytorch_model.bin")),
            r"pytorch_model\.bin may be a pickle",
        ),
        ("config.json", lambda path: path.write_text("{"), r"config\.json is not complete JSON"),
        (
            "config.json",
            lambda path: path.write_text('{"a": ' + "[" * 100_000),
            r"config\.json is not complete JSON",
        ),
        (
            "tokenizer.json",
            lambda path: path.write_text('{"a": ' + "[" * 100_000),
            r"tokenizer\.json is not complete JSON",
        ),
        ("model.safetensors", lambda path: write_nan(path), "input_layernorm.weight contains NaN"),
        ("config.json", lambda path: path.unlink(), r"there is no .*config\.json"),
        ("tokenizer.json", lambda path: path.unlink(), r"there is no .*tokenizer\.json"),
        ("tokenizer.json", lambda path: path.write_text("{}"), r"tokenizer\.json is JSON, but no tokenizer"),
        ("config.json", lambda path: path.write_text("[]"), r"config\.json holds a list"),
        (
            "generation_config.json",
            lambda path: path.write_text("{"),
            r"generation_config\.json is not complete JSON",
        ),
        (
            "model.safetensors.index.json",
            lambda path: path.write_text("{}"),
            r"index\.json has no weight_map",
        ),
        (
            "generation_config.json",
            lambda path: path.write_text(path.read_text().replace('"eos_token_id": 2', '"eos_token_id": 3')),
            "eos is 3",
        ),
        (
            "tokenizer.json",
            lambda path: write_json(path, read_json_object(path) | {"post_processor": None}),
            "has other special tokens around it",
        ),
    ],
)
def test_a_damaged_file_is_named(file: str, damage: Any, message: str, folder_of: Any) -> None:
    folder, _ = folder_of("llama")
    damage(folder / file)
    update_hashes(folder)
    report = verify(folder)
    assert not report.ok and re.search(message, report.failures), report


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "lacks files, fingerprints, model"),
        ("[1]", "holds a list"),
        ('{"model": {"x": 1}, "files": {}, "fingerprints": {}}', "not know"),
    ],
)
def test_a_damaged_record_is_named(content: str, message: str, folder_of: Any) -> None:
    folder, _ = folder_of("llama")
    (folder / published_folder.RECORD).write_text(content)
    assert message in verify(folder).failures


def test_folders_beside_the_files_are_ignored(folder_of: Any) -> None:
    folder, _ = folder_of("llama")
    (folder / ".git").mkdir()
    assert verify(folder).ok


def test_a_tokenizer_other_than_the_one_trained_with_is_noticed(folder_of: Any) -> None:
    folder, _ = folder_of("llama")
    path = folder / "tokenizer.json"
    spec = json.loads(path.read_text())
    spec["model"]["vocab"][-1], spec["model"]["vocab"][-2] = (
        spec["model"]["vocab"][-2],
        spec["model"]["vocab"][-1],
    )
    path.write_text(json.dumps(spec))
    update_hashes(folder)
    assert "its fingerprint is not the one" in verify(folder).failures


def test_weights_that_are_not_the_trained_ones_are_noticed(folder_of: Any) -> None:
    folder, (config, state) = folder_of("t5gemma")
    other = {**state, "decoder.norm.weight": state["decoder.norm.weight"] * 1.001}
    assert "weights: model.decoder.norm.weight differ" in verify(folder, (config, other)).failures
    deeper = config.model_copy(update={"rope_theta": 20_000.0})
    assert (
        "config: config.json has no rope_theta 20000.0 (it has 10000.0)"
        in verify(folder, (deeper, state)).failures
    )


def test_a_head_that_the_stock_class_ties_by_mistake_is_noticed(folder_of: Any) -> None:
    folder, _ = folder_of("llama, own head, other theta")
    config_json = folder / "config.json"
    config_json.write_text(
        config_json.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true')
    )
    update_hashes(folder)
    assert not verify(folder).ok


def test_generated_text_that_differs_from_the_stock_class_is_noticed(
    folder_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = folder_of("llama")
    monkeypatch.setattr(parity, "generate", lambda *given, **ids: [[*generate(*given, **ids)[0][:-1], 7]])
    assert failed(verify(folder)) == {"greedy"}


def test_tied_weights_are_compared_in_memory(folder_of: Any) -> None:
    from transformers import AutoModelForSeq2SeqLM

    folder, (config, _) = folder_of("t5gemma")
    stock = AutoModelForSeq2SeqLM.from_pretrained(folder)
    assert (
        parity.tied_weights(stock, config).ok
        and not parity.tied_weights(stock, config.model_copy(update={"tie_embeddings": False})).ok
    )
    stock.lm_head.out_proj.weight = torch.nn.Parameter(stock.lm_head.out_proj.weight.clone())
    assert not parity.tied_weights(stock, config).ok


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_made_by_the_stock_class_alone_is_verified_too(
    name: str, folder_of: Any, tmp_path: Path
) -> None:
    import transformers

    folder, _ = folder_of(name)
    stock_class = getattr(transformers, read_json_object(folder / "config.json")["architectures"][0])
    stock_class.from_pretrained(folder).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    report = verify(tmp_path)
    assert report.ok, report.failures
    assert "made elsewhere" in report.checks[0].detail


def test_a_bare_class_is_verified_by_its_hidden_states(folder_of: Any, tmp_path: Path) -> None:
    import transformers

    folder, _ = folder_of("bert")
    transformers.BertModel.from_pretrained(folder).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    report = verify(tmp_path)
    assert report.ok, report.failures
    tensors = next(check for check in report.checks if check.name == "tensors")
    assert "dropped: bert.pooler.dense" in tensors.detail and "initialised: head.bias" in tensors.detail


def test_an_index_that_does_not_fit_is_noticed(folder_of: Any) -> None:
    folder, _ = folder_of("llama")
    tensors = weights.read_tensors(folder)
    weights.write_tensors(folder, tensors, 20_000)
    update_hashes(folder)
    assert "index: model.safetensors lies beside" in verify(folder).failures
    (folder / "model.safetensors").unlink()
    update_hashes(folder)
    assert verify(folder).ok
    index = read_json_object(folder / weights.INDEX)
    write_json(folder / weights.INDEX, index | {"metadata": {"total_size": 7}})
    update_hashes(folder)
    assert "the index says 7" in verify(folder).failures


@pytest.mark.parametrize("name", ["t5gemma", "gpt2", "bert, answers"])
def test_a_gradient_that_differs_is_named(name: str, folder_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = folder_of(name)

    def bent(*given: Any) -> dict[str, torch.Tensor]:
        found = gradients(*given)
        return found | {"embed.weight": found["embed.weight"] * 1.001}

    monkeypatch.setattr(parity, "gradients", bent)
    report = verify(folder)
    assert failed(report) == {"training"} and "in embed.weight" in report.failures


def test_without_transformers_the_error_names_the_extra(
    folder_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = folder_of("llama")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install 'trifold\[publish\]'"):
        verify(folder)


def test_a_missing_folder_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no folder"):
        verify(tmp_path / "nowhere")
