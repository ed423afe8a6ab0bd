import errno
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.paths import DATA
from tests.pretrain.data.small_corpus import recipe
from trifold.modeling.errors import UserError
from trifold.pretrain.config.objectives import CausalConfig
from trifold.pretrain.config.pretraining import PretrainConfig, SourceConfig, TokenizerConfig
from trifold.pretrain.data import prepare as module
from trifold.pretrain.data import shards as shards_module
from trifold.pretrain.data.corpus import documents, is_heldout
from trifold.pretrain.data.prepare import over_processes, prepare
from trifold.pretrain.data.shards import Shards
from trifold.pretrain.data.tokenizer.tokenizer import Tokenizer, train
from trifold.pretrain.data.tokenizer.word_cache import WordCache
from trifold.pretrain.run import open_rows
from trifold.pretrain.run import prepare as prepare_run


def sentences(count: int) -> list[str]:
    draw = random.Random(3)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(1, 8))) for _ in range(300)]
    return [" ".join(draw.choices(words, k=draw.randint(1, 30))) for _ in range(count)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train(sentences(500), TokenizerConfig(), 600, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def source(tmp_path: Path) -> SourceConfig:
    (tmp_path / "text.txt").write_text("\n\n".join(sentences(300)))
    return SourceConfig(path=str(tmp_path / "text.txt"))


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module, "_BATCH", 300)  # a shard can end only where a batch does
    yield


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("small_batches")
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁")), min_size=1))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_documents_come_back_from_shards_as_they_went_in(
    tmp_path: Path, tokenizer: Tokenizer, texts: list[str]
) -> None:
    path = tmp_path / "any.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in ["some text", *texts]))
    os.utime(
        path, ns=(hash(tuple(texts)) % 2**60,) * 2
    )  # examples follow each other within one tick of the clock
    parts = prepare(
        SourceConfig(path=str(path)), tokenizer, tmp_path / "shards", heldout_fraction=0.3, shard_bytes=20
    )
    kept = [text for text in ["some text", *texts] if text]
    for shards, held in zip(parts, (False, True), strict=True):
        expected = [text for text in kept if is_heldout(text, 0.3) == held]
        assert [tokenizer.decode(shards.document(i)) for i in range(shards.num_documents)] == expected
        assert shards.num_bytes == sum(len(text.encode()) for text in expected)
        assert (
            shards.num_tokens
            == shards.lengths.sum()
            == sum(len(shards.document(i)) for i in range(shards.num_documents))
        )
    assert sum(part.index["dropped"] for part in parts) == len(texts) + 1 - len(kept)


@pytest.mark.usefixtures("small_batches")
def test_the_bytes_do_not_depend_on_the_number_of_workers(
    tmp_path: Path, tokenizer: Tokenizer, source: SourceConfig
) -> None:
    for workers in (1, 3):
        shards, _ = prepare(
            source,
            tokenizer,
            tmp_path / str(workers),
            spread=over_processes(workers),
            heldout_fraction=0.1,
            shard_bytes=2000,
        )
        assert len(shards.index["shards"]) > 5
        texts = [tokenizer.decode(shards.document(i)) for i in range(shards.num_documents)]
        assert texts == [text for text in sentences(300) if not is_heldout(text, 0.1)]
    assert contents(tmp_path / "1") == contents(tmp_path / "3")


def test_shards_are_used_again_until_text_tokenizer_or_rule_changes(
    tmp_path: Path, tokenizer: Tokenizer, source: SourceConfig
) -> None:
    heard: list[tuple[int, int]] = []

    def made(source: SourceConfig, tokenizer: Tokenizer, fraction: float) -> str:
        heard.clear()
        return prepare(
            source, tokenizer, tmp_path / "s", heldout_fraction=fraction, progress=lambda *n: heard.append(n)
        )[0].fingerprint

    first = made(source, tokenizer, 0.1)
    assert heard[-1] == (300, sum(map(len, sentences(300))))
    assert made(source, tokenizer, 0.1) == first and not heard
    assert made(source, tokenizer, 0.2) != first and heard
    other = train(sentences(501), TokenizerConfig(), 600, tmp_path / "other")
    assert made(source, other, 0.1) != first and heard
    path = Path(str(source.path))
    os.utime(path, ns=(1, 1))
    assert made(source, tokenizer, 0.1) == first and heard  # made anew, but of the same tokens: a run goes on
    path.write_text(path.read_text() + "\n\nmore")
    assert made(source, tokenizer, 0.1) != first


class Killed(BaseException): ...


@pytest.mark.usefixtures("small_batches")
def test_an_interrupted_preparation_is_never_taken_for_a_whole_one(
    tmp_path: Path, tokenizer: Tokenizer, source: SourceConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        raise Killed

    for place in ("progress", "ShardWriter.close", "Path.rename"):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            if place != "progress":
                patch.setattr(f"trifold.pretrain.data.prepare.{place}", die)
            changes: dict[str, Any] = {"progress": die} if place == "progress" else {}
            prepare(source, tokenizer, tmp_path / "s", **changes)
        with pytest.raises(UserError, match="no complete token shards"):
            Shards(tmp_path / "s" / "train")
    prepare(source, tokenizer, tmp_path / "s")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s", "s.lock", "text.txt"]


@pytest.mark.usefixtures("small_batches")
def test_an_interrupted_preparation_goes_on_after_its_last_full_shard_to_the_same_bytes(
    tmp_path: Path, tokenizer: Tokenizer, source: SourceConfig
) -> None:
    seen: list[str] = []

    def counted(work, batches):
        for batch in batches:
            seen.extend(batch)
            yield work(batch)

    def made(folder: Path, die_after: int) -> None:
        def progress(documents: int, _: int) -> None:
            if documents > die_after:
                raise Killed

        seen.clear()
        prepare(
            source,
            tokenizer,
            folder,
            heldout_fraction=0.1,
            shard_bytes=2000,
            spread=counted,
            progress=progress,
        )

    made(tmp_path / "whole", 1000)
    with pytest.raises(Killed):
        made(tmp_path / "s", 150)
    state = json.loads((tmp_path / "s.incomplete" / "state.json").read_text())
    for part in ("train", "heldout"):
        for name in {name for name, _ in state[part]["sizes"]} - state[part]["finished"].keys():
            with (tmp_path / "s.incomplete" / part / name).open("ab") as file:
                file.write(b"what came after the last save")
    with pytest.raises(Killed):
        made(tmp_path / "s", 250)
    assert seen[0] == sentences(300)[state["done"][1]] and state["done"][1] > 100
    made(tmp_path / "s", 1000)
    assert seen[0] not in sentences(300)[:200]
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")


def test_a_damaged_shard_is_named_and_made_again(
    tmp_path: Path, tokenizer: Tokenizer, source: SourceConfig, caplog: pytest.LogCaptureFixture
) -> None:
    shards, _ = prepare(source, tokenizer, tmp_path / "s")
    path = shards.folder / "00000.tokens"
    good = path.read_bytes()

    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(UserError, match=r"00000\.tokens is not what was written"):
        Shards(shards.folder)

    path.write_bytes(good[:-2])
    with pytest.raises(
        UserError, match=rf"00000\.tokens has {len(good) - 2} bytes where its index says {len(good)}"
    ):
        Shards(shards.folder)
    again, _ = prepare(source, tokenizer, tmp_path / "s")
    assert "00000.tokens has" in caplog.text and again.fingerprint == shards.fingerprint

    path.unlink()
    with pytest.raises(UserError, match=r"00000\.tokens has 0 bytes"):
        Shards(shards.folder)


INDEX_DAMAGE = {
    "nested": lambda index: '{"sizes": ' + "[" * 100_000,
    "list": lambda index: "[]",
    "empty": lambda index: "",
    "binary": lambda index: b"\xff\xfe",
    "count": lambda index: json.dumps({**json.loads(index), "bytes": 7}),
    "dtype": lambda index: json.dumps({**json.loads(index), "dtype": "<u1"}),
    "keys": lambda index: json.dumps({"checksum": "0"}),
}


@pytest.mark.parametrize("damage", INDEX_DAMAGE.values(), ids=INDEX_DAMAGE)
def test_a_damaged_index_is_named_and_made_again(
    tmp_path: Path, tokenizer: Tokenizer, source: SourceConfig, damage: Callable[[str], str | bytes]
) -> None:
    shards, _ = prepare(source, tokenizer, tmp_path / "s")
    index = shards.folder / "index.json"
    content = damage(index.read_text())
    index.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=r"index\.json is missing, damaged"):
        Shards(shards.folder)
    assert prepare(source, tokenizer, tmp_path / "s")[0].fingerprint == shards.fingerprint


@pytest.mark.parametrize("name", ["00000.tokens", "lengths.int64", "starts.int64"])
@pytest.mark.parametrize("half", ["train", "heldout"])
def test_an_edit_of_the_same_size_is_found_although_it_restores_the_time(
    tmp_path: Path,
    tokenizer: Tokenizer,
    source: SourceConfig,
    monkeypatch: pytest.MonkeyPatch,
    half: str,
    name: str,
) -> None:
    prepare(source, tokenizer, tmp_path / "s", heldout_fraction=0.3)
    monkeypatch.setattr(shards_module, "CLOCK_NANOSECONDS", -(10**9))  # files just written count as settled
    folder = tmp_path / "s" / half
    Shards(folder)
    with monkeypatch.context() as patch:
        patch.setattr(shards_module, "_check_hash", None)
        Shards(folder)  # verified before: no file is read again

    path = folder / name
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[8] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(UserError, match=rf"{name} is not what was written"):
        Shards(folder)


def test_files_that_were_just_written_are_hashed_again(
    tmp_path: Path, tokenizer: Tokenizer, source: SourceConfig
) -> None:
    shards, _ = prepare(source, tokenizer, tmp_path / "s")
    Shards(shards.folder)
    assert not (shards.folder / "verified.json").exists()  # an edit within the clock's tick would not show


def test_a_shard_that_is_replaced_while_it_is_read_is_noticed(
    tmp_path: Path, tokenizer: Tokenizer, source: SourceConfig
) -> None:
    shards, _ = prepare(source, tokenizer, tmp_path / "s")
    path = shards.folder / "00000.tokens"
    path.write_bytes(bytes(path.stat().st_size))  # another run prepared there before a document was read
    with pytest.raises(UserError, match=r"00000\.tokens is not what was written"):
        shards.document(0)


def test_two_runs_in_one_cache_never_read_each_others_text(tmp_path: Path) -> None:
    def config(name: str, count: int) -> PretrainConfig:
        (tmp_path / f"{name}.txt").write_text("\n\n".join(sentences(count)))
        config = recipe(CausalConfig(), row_length=32)
        data = config.data.model_copy(
            update={
                "sources": (SourceConfig(path=str(tmp_path / f"{name}.txt")),),
                "cache": str(tmp_path / "cache"),
            }
        )
        model = config.model.model_copy(update={"vocab_size": 600})
        changes = {"run": str(tmp_path / name), "data": data, "model": model, "tokenizer": tokenizers[name]}
        return config.model_copy(update=changes)

    train(sentences(500), TokenizerConfig(), 600, tmp_path / "same")
    same = TokenizerConfig(path=str(tmp_path / "same"))
    tokenizers = {"a": same, "b": same, "c": TokenizerConfig()}
    first, second, third = config("a", 300), config("b", 301), config("c", 300)

    def quiet(what: str, done: int) -> None: ...

    prepare_run(first, 1, quiet)
    open_rows(first)
    prepare_run(second, 1, quiet)  # before the ranks of the first run have opened their rows
    with pytest.raises(UserError, match=r"source-0/train were made with the recipe .* another run"):
        open_rows(first)
    prepare_run(third, 1, quiet)
    with pytest.raises(UserError, match=r"source-0/train were made with the tokenizer .* another run"):
        open_rows(first)
    open_rows(third)


def test_a_document_is_a_view_of_the_file_and_wide_vocabularies_take_four_bytes(
    tmp_path: Path, tokenizer: Tokenizer, source: SourceConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow, _ = prepare(source, tokenizer, tmp_path / "narrow")
    monkeypatch.setattr(tokenizer, "dtype", np.dtype("<u4"))
    monkeypatch.setattr(tokenizer, "_words", WordCache(tokenizer._fast, tokenizer._spec, tokenizer.dtype))
    wide, _ = prepare(source, tokenizer, tmp_path / "wide")
    assert narrow.document(7).dtype == np.uint16 and wide.document(7).dtype == np.uint32
    assert (
        isinstance(narrow.document(7).base.base, np.memmap)
        and narrow.document(7).tolist() == wide.document(7).tolist()
    )
    assert (narrow.lengths == wide.lengths).all() and narrow.num_tokens == wide.num_tokens


def test_a_bad_file_in_the_middle_and_a_full_disk_are_refused(
    tmp_path: Path, tokenizer: Tokenizer, source: SourceConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "z.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match="not UTF-8: byte 0"):
        prepare(
            SourceConfig(path=str(tmp_path / "*.txt")), tokenizer, tmp_path / "s", spread=over_processes(2)
        )

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards_module._HashedFile, "write", full)
    with pytest.raises(UserError, match="no space is left"):
        prepare(source, tokenizer, tmp_path / "s")
    assert not (tmp_path / "s.incomplete").exists()  # it would fill the disk that is full


def test_workers_end_when_the_process_that_started_them_is_killed(
    tmp_path: Path, tokenizer: Tokenizer, source: SourceConfig
) -> None:
    tokenizer.save(tmp_path / "tokenizer", "decoder")
    code = (
        "import time; from trifold.pretrain.data.prepare import *\n"
        f"prepare(SourceConfig(path={source.path!r}), Tokenizer.open({str(tmp_path / 'tokenizer')!r}),"
        f" {str(tmp_path / 's')!r},"
        " spread=over_processes(2), progress=lambda *_: (print('begun', flush=True), time.sleep(600)))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "begun\n"
    process.kill()
    process.communicate(timeout=60)  # returns when nobody holds the other end of its output any more


@pytest.mark.skipif(not DATA.exists(), reason=f"the real corpora are not at {DATA} (set TRIFOLD_DATA)")
def test_the_dev_books_come_back_byte_for_byte(tmp_path: Path) -> None:
    source = SourceConfig(path=str(DATA / "corpora/classic-books-en/dev.txt.gz"))
    tokenizer = train(documents(source), TokenizerConfig(sample_bytes=300_000), 2000, tmp_path / "tokenizer")
    shards, _ = prepare(source, tokenizer, tmp_path / "shards")
    assert [tokenizer.decode(shards.document(i)) for i in range(shards.num_documents)] == list(
        documents(source)
    )
    assert shards.num_documents == 3 and 2.5 < shards.num_bytes / shards.num_tokens < 5
