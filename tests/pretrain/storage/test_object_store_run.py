"""Whole runs whose checkpoints lie elsewhere: in an object store, on a disk of their own; killed, throttled,
refused, full.
"""

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.processes import run_processes
from tests.recipes import recipe
from tests.s3 import Server, served
from tests.training import losses, quiet, train_run
from trifold.pretrain import session
from trifold.pretrain.checkpoint.checkpoint import verify
from trifold.pretrain.checkpoint.lease import valid_folders
from trifold.pretrain.config import training
from trifold.pretrain.config.pretraining import PretrainConfig, SourceConfig
from trifold.pretrain.data.corpus import corpus_files, corpus_fingerprint, documents
from trifold.pretrain.distributed import RankInfo
from trifold.pretrain.run import prepare, train
from trifold.pretrain.storage.jsonl import read_lines
from trifold.pretrain.storage.storage import checkpoint_root, location
from trifold.pretrain.storage.storage_path import StorageOptions


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with served(tmp_path_factory.mktemp("s3")) as server:
        yield server


def kept(place: str) -> training.CheckpointConfig:
    return training.CheckpointConfig(every=4, keep_last=3, storage=place)


def events(config: PretrainConfig, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_lines(Path(config.run) / "events.jsonl") if event["event"] == kind]


def trained_in_parts(place: RankInfo, config: PretrainConfig) -> None:
    """Train, and upload each rank's file in parts, though it is small."""
    small = StorageOptions(chunk_bytes=4096)
    session.checkpoint_root = lambda run, storage: checkpoint_root(run, storage).with_options(small)
    train(config, place)


def when(sign: Any, act: Any) -> threading.Thread:
    """Do something as soon as something is seen."""

    def watch() -> None:
        while not sign():
            time.sleep(0.02)
        act()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


@pytest.mark.proof
def test_a_run_killed_in_an_upload_of_parts_resumes_from_the_checkpoint_before_bit_for_bit(
    server: Server, tmp_path: Path
) -> None:
    straight, broken = (
        recipe(tmp_path, "straight"),
        recipe(tmp_path, "broken", checkpoints=kept(server.bucket("killed"))),
    )
    for config in (straight, broken):
        prepare(config, 1, quiet)
    run_processes(2, train_run, straight)

    def uploading() -> bool:
        return any(
            "PUT" in line and "step-00000008-g0001/rank-00000" in line and "partNumber" in line
            for line in server.requests()
        )

    server.faults(slow=0.5)
    when(uploading, lambda: os.kill(events(broken, "started")[0]["pid"], signal.SIGKILL))
    with pytest.raises(AssertionError, match=r"ended without a result|onnection"):
        run_processes(2, trained_in_parts, broken)
    home = checkpoint_root(Path(broken.run), broken.checkpoints.storage)
    assert [folder.name for folder in valid_folders(home)] == ["step-00000004-g0001"]

    shutil.rmtree(tmp_path / "broken" / "tensorboard")
    (tmp_path / "broken").rename(
        tmp_path / "elsewhere"
    )  # another host, which has only the recipe and the tokenizer
    (tmp_path / "broken").mkdir()
    shutil.copytree(tmp_path / "elsewhere" / "tokenizer", tmp_path / "broken" / "tokenizer")
    server.faults(busy=3)
    began, asked = time.monotonic(), len(server.requests())
    run_processes(2, trained_in_parts, broken)
    seconds = time.monotonic() - began
    server.faults()
    assert events(broken, "resumed")[0]["checkpoint"] == "step-00000004-g0001"
    assert losses(broken.run) == {step: told for step, told in losses(straight.run).items() if step > 4}
    saved = valid_folders(home)
    assert [folder.name for folder in saved] == [
        "step-00000004-g0001",
        "step-00000008-g0002",
        "step-00000012-g0002",
    ]
    for folder in saved:
        verify(folder)
    busy = sum("503" in line for line in server.requests()[asked:])
    print(
        json.dumps(
            {
                "bytes": events(broken, "save_committed")[-1]["bytes"],
                "save_s": [e["seconds"] for e in events(broken, "save_committed")],
                "resumed_run_s": seconds,
                "requests": len(server.requests()) - asked,
                "503": busy,
                "told": len(events(broken, "request_failed")),
            }
        )
    )
    assert busy > 20 and events(broken, "request_failed")


@pytest.mark.proof
def test_a_bucket_that_refuses_writes_ends_the_run_at_that_save_and_the_last_checkpoint_stays(
    server: Server, tmp_path: Path
) -> None:
    config = recipe(tmp_path, "run", steps=400, checkpoints=kept(server.bucket("denied")))
    prepare(config, 1, quiet)
    when(lambda: events(config, "save_committed"), lambda: server.faults(deny=True))
    with pytest.raises(
        AssertionError,
        match=r"UserError: step \d+ was trained but could not be saved: .*AccessDenied.*;"
        " the checkpoint before stays",
    ):
        run_processes(1, train_run, config)
    server.faults()
    assert max(losses(config.run)) < 100
    for folder in (saved := valid_folders(checkpoint_root(Path(config.run), config.checkpoints.storage))):
        verify(folder)
    shorter = config.model_copy(update={"steps": max(losses(config.run)) + 4})
    run_processes(1, train_run, shorter)
    assert events(config, "resumed")[-1]["checkpoint"] == saved[-1].name and events(config, "finished")


@pytest.mark.proof
@pytest.mark.parametrize("trouble", ["full", "read-only"])
def test_a_disk_that_is_full_or_read_only_ends_the_run_with_one_sentence(
    trouble: str, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        os.geteuid()
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], capture_output=True
        ).returncode
    ):
        pytest.skip("mounting a small disk needs root")
    try:
        config = recipe(tmp_path, "run", steps=400, checkpoints=kept(str(disk)))
        prepare(config, 1, quiet)

        def spoil() -> None:
            if trouble == "full":
                subprocess.run(["dd", "if=/dev/zero", f"of={disk}/filler", "bs=1M"], capture_output=True)
            else:
                subprocess.run(["mount", "-o", "remount,ro", disk])

        when(lambda: events(config, "save_committed"), spoil)
        with pytest.raises(AssertionError, match=r"UserError: .*(is full|refuses writes)"):
            run_processes(1, train_run, config)
        assert max(losses(config.run)) < 300
        for folder in (saved := valid_folders(checkpoint_root(Path(config.run), config.checkpoints.storage))):
            verify(folder)
        assert saved
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_text_in_a_bucket_is_the_text_of_the_same_files_on_a_disk(server: Server, tmp_path: Path) -> None:
    import gzip

    bucket, texts = (
        server.bucket("texts"),
        {
            "b.txt": "two\n\nthr\u00e9e\n",
            "a.txt.gz": "one",
            "sub/c.jsonl": '{"text": "four"}\n',
            "d.md": "no",
        },
    )
    for name, text in texts.items():
        content = gzip.compress(text.encode()) if name.endswith(".gz") else text.encode()
        location(f"{bucket}/corpus/{name}").replace(content)
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    for below in ("", "/*.txt*", "/b.txt", "/sub"):
        there, here = SourceConfig(path=f"{bucket}/corpus{below}"), SourceConfig(path=f"{tmp_path}{below}")
        assert [*documents(there)] == [*documents(here)] and [f.name for f in corpus_files(there)] == [
            f.name for f in corpus_files(here)
        ]
    source = SourceConfig(path=f"{bucket}/corpus")
    before = corpus_fingerprint(source)
    assert before == corpus_fingerprint(source)
    location(f"{bucket}/corpus/b.txt").replace(b"two\n\nfive\n\n")
    assert corpus_fingerprint(source) != before
    with pytest.raises(ValueError, match="no object is named s3://texts/none"):
        corpus_files(SourceConfig(path=f"{bucket}/none"))
