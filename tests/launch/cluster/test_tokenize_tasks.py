"""Text tokenized on a real cluster: the bytes of one process, whoever is killed on the way."""

import json
import os
import signal
import subprocess
import sys
import time
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tests.launch.jobs.cluster_runs import trifold, write_recipe
from trifold.launch.cluster import connection
from trifold.launch.cluster.tokenize_tasks import over_cluster
from trifold.launch.recipe.reader import CLONE
from trifold.pretrain.config.pretraining import SourceConfig
from trifold.pretrain.config.pretraining import TokenizerConfig as TokenizerConfig
from trifold.pretrain.data import prepare as module
from trifold.pretrain.data.prepare import Tokenize, over_processes, prepare
from trifold.pretrain.data.tokenizer.tokenizer import Tokenizer, train

TEXTS = [
    f"Document {i} says that {i * i % 997} is {'odd' if i % 2 else 'even'} and {i * 7919 % 1000} comes after."
    for i in range(2000)
]


@pytest.fixture
def source(tmp_path: Path) -> SourceConfig:
    (tmp_path / "text.txt").write_text("\n\n".join(TEXTS))
    return SourceConfig(path=str(tmp_path / "text.txt"))


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    train(TEXTS, TokenizerConfig(), 500, tmp_path / "tokenizer")
    return Tokenizer.open(tmp_path / "tokenizer")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_ray_tasks_make_the_bytes_of_one_process_though_a_worker_is_killed(
    ray_cluster, tmp_path, source, tokenizer, monkeypatch
):
    marker = tmp_path / "killed"

    class Dying(Tokenize):  # made here, so that Ray ships it by value
        def __call__(self, texts):
            if any("Document 1000 " in text for text in texts) and not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(texts)

    import ray

    connection.join()
    monkeypatch.setattr(module, "_BATCH", 4000)
    keys: dict[str, Any] = {"heldout_fraction": 0.1, "shard_bytes": 10_000}
    for name, spread in (
        ("one", map),
        ("two", over_processes(2)),
        ("ray", over_cluster(ray.get_runtime_context().gcs_address)),
    ):
        with monkeypatch.context() as patch:
            if name == "ray":
                patch.setattr(module, "Tokenize", Dying)
            made, _ = prepare(source, tokenizer, tmp_path / name, spread=spread, **keys)
        assert len(made.index["shards"]) > 5
    assert marker.exists()
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(tmp_path / "ray")


def test_a_process_that_tokenizes_imports_neither_torch_nor_what_trains():
    code = (
        "import sys, trifold.launch.cluster.tokenize_tasks;"
        " print(sorted({'torch', 'deepspeed', 'ray', 'transformers'} & sys.modules.keys()))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=CLONE) == "[]\n"


@pytest.mark.proof
def test_prepare_on_a_cluster_makes_what_prepare_makes_here(hosts, tmp_path):
    recipe = str(write_recipe(tmp_path / "text", 10))
    there = hosts.on(
        DRIVER_HOST,
        sys.executable,
        "-m",
        "trifold.launch.cli",
        "prepare",
        recipe,
        f"run={tmp_path}/there",
        "--address",
        hosts.address,
    )
    assert there.returncode == 0, there.stderr
    here = trifold(hosts, "prepare", recipe, f"run={tmp_path}/here")
    assert here.returncode == 0, here.stderr
    assert contents(tmp_path / "there/shards/source-0/train")["00000.tokens"]
    made = [contents(tmp_path / name / "shards/source-0") for name in ("there", "here")]
    assert made[0] == made[1]


# The head: a driver joins the node that it finds among its machine's processes, the head's first. These hosts
# share one list of processes, so on another host it would take the head's address for its own, and no worker
# could answer it.
DRIVER_HOST = 0

DRIVER = """
import sys
import time
from pathlib import Path
from trifold.launch.cluster.tokenize_tasks import over_cluster
from trifold.pretrain.config.pretraining import SourceConfig
from trifold.pretrain.data import prepare as module
from trifold.pretrain.data.tokenizer.tokenizer import Tokenizer

folder, address = Path(sys.argv[1]), sys.argv[2]
module._BATCH = 4000
over = over_cluster(address)

def counted(work, batches):
    def noted():
        for batch in batches:
            with (folder / "handed-out").open("a") as file:
                file.write(batch[0].split()[1] + "\\n")
            time.sleep(0.2)  # a corpus that is long enough to be killed in
            yield batch
    return over(work, noted())

source, tokenizer = SourceConfig(path=str(folder / "text.txt")), Tokenizer.open(folder / "tokenizer")
module.prepare(source, tokenizer, folder / "ray", heldout_fraction=0.1, shard_bytes=10_000, spread=counted)
"""


@pytest.mark.proof
def test_a_preparation_on_several_hosts_goes_on_where_its_driver_was_killed(
    hosts, tmp_path, source, tokenizer, monkeypatch
):
    monkeypatch.setattr(module, "_BATCH", 4000)
    prepare(source, tokenizer, tmp_path / "one", heldout_fraction=0.1, shard_bytes=10_000)
    command = [
        "ip",
        "netns",
        "exec",
        f"trifold-host{DRIVER_HOST}",
        sys.executable,
        "-c",
        DRIVER,
        str(tmp_path),
        hosts.address,
    ]
    first = subprocess.Popen(command, env=hosts.environment, cwd=CLONE)
    state = tmp_path / "ray.incomplete" / "state.json"
    for _ in count():
        assert first.poll() is None, "it ended by itself"
        if state.exists():
            break
        time.sleep(0.01)
    first.kill()
    first.wait()
    saved = state.read_text()
    (tmp_path / "handed-out").unlink()
    hosts.kill(3)  # and a host that tokenized is gone too
    subprocess.run(command, env=hosts.environment, cwd=CLONE, check=True, timeout=120)
    done = json.loads(saved)["done"]
    assert 0 < done[1] < len(TEXTS)
    assert int((tmp_path / "handed-out").read_text().split()[0]) >= done[1]
    assert contents(tmp_path / "ray") == contents(tmp_path / "one")
