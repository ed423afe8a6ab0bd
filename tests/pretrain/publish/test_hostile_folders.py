"""Folders that somebody made to do harm: each is one sentence, within seconds and 500 MB, and none of its
code runs.
"""

import builtins
import contextlib
import json
import os
import re
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.published import copy_published
from trifold.modeling.errors import UserError
from trifold.pretrain.publish import published_folder
from trifold.pretrain.publish.describe import describe
from trifold.pretrain.publish.verify import verify
from trifold.pretrain.publish.weights import INDEX, WEIGHTS, read_tensors
from trifold.pretrain.storage.foreign_files import is_plain_name
from trifold.pretrain.storage.json_files import read_json_object, write_json

pytest.importorskip("transformers")
SECONDS, MEGABYTES = 5, 500
RAN = "the code of a folder ran"


def change(file: str, **values: Any) -> Callable[[Path], None]:
    """Set values of a JSON file."""

    def damage(folder: Path) -> None:
        write_json(folder / file, read_json_object(folder / file) | values)

    return damage


def replace(file: str, content: bytes | str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / file).unlink(missing_ok=True)
        (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())

    return damage


def link(file: str, target: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / file).unlink(missing_ok=True)
        (folder / file).symlink_to(target)

    return damage


def fifo(file: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / file).unlink(missing_ok=True)
        os.mkfifo(folder / file)

    return damage


def header(content: Any, data: int = 16, length: int | None = None) -> Callable[[Path], None]:
    """A safetensors file of this header, and so many bytes of data."""
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    size = len(text) if length is None else length
    return replace(WEIGHTS, struct.pack("<Q", size) + text + bytes(data))


def tensor(**values: Any) -> dict[str, Any]:
    return {"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16], **values}}


def index(weight_map: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder / "model-00001-of-00001.safetensors")
        (folder / INDEX).write_text(json.dumps(weight_map))

    return damage


def to_shard(file: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        names = read_tensors(folder)
        index({"weight_map": dict.fromkeys(names, file)})(folder)

    return damage


def with_code(file: str, **values: Any) -> Callable[[Path], None]:
    """Settings that name a Python file, which lies in the folder."""

    def damage(folder: Path) -> None:
        (folder / "code.py").write_text(f"import builtins\nbuiltins.ran = {RAN!r}\nclass Thing: pass\n")
        change(file, **values)(folder)

    return damage


def change_tokenizer(**values: Any) -> Callable[[Path], None]:
    return change("tokenizer.json", **values)


def huge_id(folder: Path) -> None:
    spec = read_json_object(folder / "tokenizer.json")
    spec["model"] = {"type": "WordPiece", "vocab": {"<unk>": 0, "a": 4_000_000_000}, "unk_token": "<unk>"}
    spec["model"] |= {"continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
    write_json(folder / "tokenizer.json", spec)


CODE = {
    "AutoModelForCausalLM": "code.Thing",
    "AutoTokenizer": ["code.Thing", None],
    "AutoConfig": "code.Thing",
}
SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
# kind -> (damage, what the sentence says)
HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "code of a model": (with_code("config.json", auto_map=CODE), "sets auto_map"),
    "code of a tokenizer": (with_code("tokenizer_config.json", auto_map=CODE), "sets auto_map"),
    "a kernel of the hub": (change("config.json", _attn_implementation="x/y"), "sets _attn_implementation"),
    "a pickle": (lambda folder: (folder / WEIGHTS).rename(folder / "pytorch_model.bin"), "may be a pickle"),
    "weights named elsewhere": (
        change("config.json", transformers_weights="../x.bin"),
        "transformers_weights",
    ),
    "adapters over another model": (replace("adapter_config.json", "{}"), "adapter_config.json"),
    "a tokenizer elsewhere": (
        change("tokenizer_config.json", fast_tokenizer_files=["../../tokenizer.4.0.json"]),
        "fast_tokenizer_files",
    ),
    "a shard above the folder": (to_shard("../model.safetensors"), "only .safetensors files of the folder"),
    "a shard at the root": (to_shard("/tmp/model.safetensors"), "only .safetensors files of the folder"),
    "a shard that is a pickle": (to_shard("model.bin"), "only .safetensors files of the folder"),
    "an index that is a list": (index([1]), "holds a list"),
    "an index of numbers": (index({"weight_map": {"a": 3}}), "no weight_map"),
    "an index of half the tensors": (
        index({"weight_map": {"a": "model-00001-of-00001.safetensors"}}),
        "disagree on",
    ),
    "an index not in UTF-8": (replace(INDEX, b"\xff\xfe"), "is not UTF-8"),
    "weights that are a FIFO": (fifo(WEIGHTS), "not a regular file"),
    "a config that is a FIFO": (fifo("config.json"), "not a regular file"),
    "a vocabulary that is a FIFO": (fifo("vocab.txt"), "not a regular file"),
    "a SentencePiece model that is a FIFO": (fifo("tokenizer.model"), "not a regular file"),
    "weights that are a device": (link(WEIGHTS, "/dev/zero"), "not a regular file"),
    "a config that is a device": (link("config.json", "/dev/zero"), "not a regular file"),
    "a link to itself": (link("config.json", "config.json"), "cannot be read|there is no"),
    "a link to nowhere": (link("merges.txt", "nowhere"), "cannot be read"),
    "a header of 2^60 bytes": (header({}, length=1 << 60), "is damaged"),
    "a header beyond the file": (header({}, length=1000), "is damaged"),
    "a header of 0 bytes": (header(b""), "is damaged"),
    "a file of 3 bytes": (replace(WEIGHTS, b"abc"), "is damaged"),
    "a header that is a list": (header([1]), "its header is a list"),
    "a header not in UTF-8": (header(b"\xff\xff\xff"), "its header is not JSON"),
    "a header nested deeply": (header(b'{"a":' + b"[" * 200_000), "its header is not JSON"),
    "a tensor that is a number": (header({"w": 3}), "lacks dtype"),
    "a huge shape": (header(tensor(shape=[1 << 40, 1 << 20])), "needs"),
    "a huge empty shape": (header(tensor(shape=[1 << 63, 0])), "has the shape"),
    "a negative shape": (header(tensor(shape=[-4])), "has the shape"),
    "a shape of booleans": (header(tensor(shape=[True])), "has the shape"),
    "a dtype of nobody": (header(tensor(dtype="F33")), "has the dtype"),
    "a dtype that is a list": (header(tensor(dtype=["F32"])), "has the dtype"),
    "offsets beyond the file": (header(tensor(shape=[1 << 30], data_offsets=[0, 1 << 32])), "the file holds"),
    "offsets backwards": (header(tensor(data_offsets=[16, 0])), "needs"),
    "overlapping tensors": (header({**tensor(), "v": tensor()["w"]}), "begins at byte"),
    "tensors with a gap": (header(tensor(data_offsets=[8, 24]), data=24), "begins at byte"),
    "a config of 65 MB": (replace("config.json", b" " * (65 << 20)), "has 68,157,440 bytes"),
    "a config of many lists": (replace("config.json", b"[" + b"[]," * 6_000_000 + b"0]"), "values"),
    "a config that is a list": (replace("config.json", "[]"), "holds a list"),
    "a config not in UTF-8": (replace("config.json", b'{"a": "\xff"}'), "is not UTF-8"),
    "no heads": (change("config.json", num_attention_heads=0), "config.json"),
    "a million layers": (change("config.json", num_hidden_layers=1_000_000), "."),
    "layers of text": (change("config.json", num_hidden_layers="two"), "config.json"),
    "a width of 2^40": (change("config.json", hidden_size=1 << 40), "."),
    "an endless number": (change("config.json", rms_norm_eps=float("inf")), "."),
    "architectures that are a number": (change("config.json", architectures=7), "config.json"),
    "architectures of lists": (change("config.json", architectures=[["LlamaForCausalLM"]]), "config.json"),
    "rope settings that are a list": (change("config.json", rope_parameters=[]), "config.json"),
    "a regular expression without end": (
        change_tokenizer(pre_tokenizer={**SPLIT, "pattern": {"Regex": "(x+x+)+y"}}),
        "tokenizer",
    ),
    "a broken regular expression": (
        change_tokenizer(pre_tokenizer={**SPLIT, "pattern": {"Regex": "(("}}),
        "tokenizer.json",
    ),
    "a token of number 4,000,000,000": (huge_id, "4,000,000,000|tokenizer.json"),
    "a tokenizer that is a list": (replace("tokenizer.json", "[1]"), "holds a list"),
    "added tokens that are text": (change_tokenizer(added_tokens="abc"), "tokenizer.json"),
    "special tokens that are lists": (change("tokenizer_config.json", eos_token=["</s>"]), "eos_token"),
    "a record that is a list": (replace("trifold.json", "[]"), "holds a list"),
    "a record of nothing": (
        replace("trifold.json", '{"model": 1, "files": 2, "fingerprints": 3}'),
        "trifold.json",
    ),
    "generation settings of lists": (change("generation_config.json", num_beams=[2]), "num_beams"),
}


def peak_megabytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) // 1024


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def sentences(folder: Path, with_verify: bool = True) -> list[str]:
    """What each way to open the folder answers; "" where it opens."""

    def attempt(work: Callable[[], Any]) -> str:
        try:
            result = work()
        except UserError as error:
            return str(error)
        return result if isinstance(result, str) else ""

    answers = [
        attempt(lambda: list(describe(folder))),
        attempt(lambda: published_folder.load_model(folder)),
        attempt(lambda: published_folder.open_tokenizer(folder)),
        attempt(lambda: published_folder.read_generation(folder)),
    ]
    return [*answers, attempt(lambda: verify(folder).failures)] if with_verify else answers


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_folder_is_one_sentence(
    kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    damage, message = HOSTILE[kind]
    copy_published(tmp_path, "llama")
    verify(tmp_path)  # what is imported and cached once is not counted
    damage(tmp_path)
    reset_peak()
    before, start = peak_megabytes(), time.monotonic()
    answers = sentences(tmp_path)
    assert time.monotonic() - start < SECONDS
    assert peak_megabytes() - before < MEGABYTES
    assert not hasattr(builtins, "ran"), RAN

    assert answers[-1] and re.search(message, " ".join(answers)), answers
    for answer in answers:
        assert "\n" not in answer.strip() and "Traceback" not in answer, answer
    if hasattr(os, "mkfifo"):
        assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("kind", ["code of a model", "code of a tokenizer"])
def test_code_is_rejected_by_name_on_import_and_on_verification(kind: str, tmp_path: Path) -> None:
    copy_published(tmp_path, "llama")
    HOSTILE[kind][0](tmp_path)
    described, loaded, _, _, verified = sentences(tmp_path)
    assert all("sets auto_map" in answer for answer in (described, loaded, verified))
    with pytest.raises(UserError, match="sets auto_map" if "tokenizer" in kind else "there is no"):
        published_folder.open_tokenizer(tmp_path if "tokenizer" in kind else tmp_path / "nowhere")


def test_a_snapshot_of_a_hub_cache_opens_through_its_links(tmp_path: Path) -> None:
    config, _ = copy_published(tmp_path / "files", "llama")
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "0123abcd"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, path in enumerate(sorted((tmp_path / "files").iterdir())):
        path.rename(blobs / f"{i:064d}")
        (snapshot / path.name).symlink_to(f"../../blobs/{i:064d}")
    assert verify(snapshot).ok
    assert published_folder.load_model(snapshot)[0].dim == config.dim
    blob = (snapshot / WEIGHTS).resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"\x01")
    assert "model.safetensors is not what was published" in verify(snapshot).failures


def test_a_chat_template_is_carried_along_and_never_rendered(tmp_path: Path) -> None:
    copy_published(tmp_path, "llama")
    endless = "{% for i in range(10**12) %}{% endfor %}"
    change("tokenizer_config.json", chat_template=endless)(tmp_path)
    start = time.monotonic()
    assert {check.name for check in verify(tmp_path).checks if not check.ok} == {"files"}
    assert time.monotonic() - start < SECONDS


@pytest.mark.parametrize("name", ["a.safetensors", "model-00001-of-00002.safetensors", "..."])
def test_plain_names_are_names_in_the_folder(name: str) -> None:
    assert is_plain_name(name)


@pytest.mark.parametrize("name", ["", ".", "..", "/a", "a/b", "../a", "a\\b", "C:a", "a\0b", "./a"])
def test_other_names_are_not_plain(name: str) -> None:
    assert not is_plain_name(name)


# Anything that can stand in the place of a value of a JSON file.
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
# (number of examples, whether the stock classes are tried too)
DEPTH = pytest.mark.parametrize(
    ("examples", "with_verify"), [(50, False), pytest.param(1000, True, marks=pytest.mark.proof)]
)


def paths(value: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The ways to all values inside a JSON value, the first hundred of each list."""
    found = [prefix] if prefix else []
    items = (
        value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    )
    for key, inner in items:
        found += paths(inner, (*prefix, key))
    return found


def put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    copy = json.loads(json.dumps(value))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = new
    return copy


def fuzz(right: Any, examples: int, check: Callable[[Any, int], Any]) -> None:
    """Call `check`, which may raise UserError, with copies of a JSON value in which one value is another."""

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck), deadline=None)
    @given(st.sampled_from(paths(right)), JSON, st.integers(-9, 9))
    def run(path: tuple[Any, ...], value: Any, offset: int) -> None:
        with contextlib.suppress(UserError):
            check(put(right, path, value), offset)

    run()


@DEPTH
@pytest.mark.parametrize(
    "file", ["config.json", "tokenizer_config.json", "generation_config.json", "trifold.json"]
)
def test_any_value_in_a_settings_file_is_read_or_rejected(
    file: str, examples: int, with_verify: bool, tmp_path: Path
) -> None:
    copy_published(tmp_path, "t5gemma")

    def check(content: Any, _: int) -> None:
        (tmp_path / file).write_text(json.dumps(content))
        sentences(tmp_path, with_verify)

    fuzz(read_json_object(tmp_path / file), examples, check)


@DEPTH
def test_any_value_in_a_tokenizer_is_read_or_rejected(
    examples: int, with_verify: bool, tmp_path: Path
) -> None:
    copy_published(tmp_path, "llama")

    def check(content: Any, _: int) -> None:
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        published_folder.Tokenizer.open(tmp_path)

    fuzz(read_json_object(tmp_path / "tokenizer.json"), examples, check)


@DEPTH
def test_any_header_of_a_weights_file_is_read_or_rejected(
    examples: int, with_verify: bool, tmp_path: Path
) -> None:
    copy_published(tmp_path, "llama")
    content = (tmp_path / WEIGHTS).read_bytes()
    length = struct.unpack("<Q", content[:8])[0]

    def check(header: Any, offset: int) -> None:
        text = json.dumps(header).encode()
        size = struct.pack("<Q", max(0, len(text) + (offset if offset < 4 else 0)))  # often the right length
        (tmp_path / WEIGHTS).write_bytes(size + text + content[8 + length :])
        read_tensors(tmp_path)

    fuzz(json.loads(content[8 : 8 + length]), examples, check)


@DEPTH
def test_any_index_is_read_or_rejected(examples: int, with_verify: bool, tmp_path: Path) -> None:
    copy_published(tmp_path, "llama")
    names = dict.fromkeys(read_tensors(tmp_path), "model-00001-of-00001.safetensors")
    index({"metadata": {"total_size": 1}, "weight_map": names})(tmp_path)

    def check(content: Any, _: int) -> None:
        (tmp_path / INDEX).write_text(json.dumps(content))
        sentences(tmp_path, with_verify)

    fuzz(read_json_object(tmp_path / INDEX), examples, check)
