"""What is wrong with a cluster: out of facts that are made up here, out of this machine, and out of real
hosts that were made sick.
"""

import json
import re
import subprocess
import sys
from copy import deepcopy

import pytest

from tests.launch.jobs.cluster_runs import trifold, write_recipe
from trifold.launch.jobs import node_facts
from trifold.launch.jobs.doctor import doctor
from trifold.launch.jobs.findings import ClusterFacts, before_submit, diagnose
from trifold.launch.terminal import Terminal

VERSIONS = {"python": "3.11.9", "trifold": "0.1.0", "torch": "2.13.0", "deepspeed": "0.19.8", "ray": "2.60.0"}


def node(number: int) -> node_facts.Facts:
    return {
        "host": f"host-{number}",
        "address": f"10.0.0.{number}",
        "versions": dict(VERSIONS),
        "gpus": ["NVIDIA H100"] * 8,
        "driver": "580.1",
        "cuda_devices": 8,
        "asked": "",
        "interface": "eth0",
        "mtu": 9000,
        "memory": (1e12, 2e12),
        "shm": 1e11,
    }


def healthy() -> ClusterFacts:
    fine: node_facts.Storage = {"error": "", "free": 1e12, "rate": 1e9}
    return ClusterFacts(
        [node(1), node(2), node(3)],
        "/shared",
        [0.001, 0.0, -0.002],
        [],
        [],
        [deepcopy(fine) for _ in range(3)],
        True,
    )


def test_of_a_healthy_cluster_nothing_is_said():
    assert diagnose(healthy()) == []


SICK = {
    "another torch": (
        lambda f: f.nodes[1]["versions"].update(torch="2.11.0"),
        True,
        r"torch differs \(2\.13\.0 on host-1, host-3; 2\.11\.0 on host-2\): install the same release"
        r" everywhere",
    ),
    "no deepspeed": (
        lambda f: f.nodes[2]["versions"].update(deepspeed="none"),
        True,
        r"host-3 has no deepspeed where its Ray runs",
    ),
    "torch without CUDA": (
        lambda f: f.nodes[0].update(cuda_devices=0),
        True,
        r"host-1 has 8 GPUs with driver 580\.1, and torch 2\.13\.0 can use 0",
    ),
    "mixed GPUs": (
        lambda f: f.nodes[1].update(gpus=["NVIDIA A100"] * 4, cuda_devices=4),
        False,
        r"GPUs differ \(8 NVIDIA H100, driver 580\.1 on host-1, host-3; 4 NVIDIA A100, driver 580\.1 on"
        r" host-2\)",
    ),
    "an interface that is not there": (
        lambda f: f.nodes[1].update(asked="ib7", interface=""),
        True,
        r"host-2 is told NCCL_SOCKET_IFNAME=ib7 and has no such interface",
    ),
    "a name that resolves to the loopback": (
        lambda f: [n.update(gpus=[], cuda_devices=0, interface="lo") for n in f.nodes[2:]],
        True,
        r"collectives on host-3 would use lo, where no other host reaches it: set GLOO_SOCKET_IFNAME to the"
        r" interface of 10\.0\.0\.3",
    ),
    "a firewall": (
        lambda f: f.unreachable.extend(
            [("host-1", "host-3", "timed out"), ("host-2", "host-3", "timed out")]
        ),
        True,
        r"host-1, host-2 cannot reach host-3 on a free port \(timed out\): open all ports between the hosts",
    ),
    "mixed MTU": (
        lambda f: f.nodes[0].update(mtu=1500),
        False,
        r"MTU differs \(9000 on host-2, host-3; 1500 on host-1\)",
    ),
    "a clock that is late": (
        lambda f: f.clocks.__setitem__(1, -61.04),
        True,
        r"host-2's clock is -61\.0 s off this one's",
    ),
    "a container's /dev/shm": (
        lambda f: f.nodes[0].update(shm=64 * 2**20),
        True,
        r"/dev/shm of host-1 has less than 1 GiB free",
    ),
    "storage of its own": (
        lambda f: f.unread.append("host-2"),
        True,
        r"host-2 does not see what host-1 wrote to /shared: mount the same storage there on all hosts",
    ),
    "storage that is read-only": (
        lambda f: [one.update(error="Read-only file system", free=0) for one in f.storage],
        True,
        r"host-1, host-2, host-3 cannot write to /shared \(Read-only file system\)",
    ),
    "storage that is nearly full": (
        lambda f: f.storage[2].update(free=2**30),
        False,
        r"/shared has 1\.0 GiB free",
    ),
    "no token": (
        lambda f: setattr(f, "token", False),
        True,
        r"answers without a token, .* set RAY_AUTH_MODE=token",
    ),
    "a node that is silent": (
        lambda f: f.silent.append(("host-4", "no answer within 90 s")),
        True,
        r"host-4 gave no answer: no answer",
    ),
    "a collective that failed": (
        lambda f: f.__dict__.update(ranks=3, backend="nccl", failed="Socket Timeout"),
        True,
        r"3 nodes could not all-reduce over nccl: Socket Timeout",
    ),
}


@pytest.mark.parametrize("case", SICK)
def test_what_is_wrong_is_one_sentence_that_says_where_and_what_to_do(case):
    break_it, fix, sentence = SICK[case]
    cluster = healthy()
    break_it(cluster)
    (finding,) = diagnose(cluster)
    assert finding.fix == fix
    assert re.search(sentence, finding.sentence), finding.sentence


@pytest.mark.parametrize(
    ("versions", "shared", "code", "said"),
    [
        ({}, True, False, None),
        ({"trifold": "0.2.0"}, True, False, "head has Trifold 0.2.0, and here is 0.1.0"),
        (
            {"trifold": "none"},
            True,
            False,
            "head has no Trifold, and here is 0.1.0: install that one there, or ship yours with --code",
        ),
        ({"trifold": "none"}, True, True, None),
        ({"deepspeed": "none"}, True, True, "head has no deepspeed where its Ray runs"),
        ({"python": "3.9.2"}, True, False, "head has Python 3.9.2, and Trifold needs 3.11 or 3.12"),
        ({}, False, False, "head does not see what was written to /shared here"),
    ],
)
def test_a_job_that_could_not_train_is_refused_before_it_is_submitted(versions, shared, code, said):
    wrong = before_submit(
        VERSIONS, {"host": "head", "versions": VERSIONS | versions, "shared": shared}, "/shared", code
    )
    assert [said in sentence for sentence in wrong] == [True] if said else wrong == []


def test_the_quick_facts_need_no_package_at_all(tmp_path):
    (tmp_path / "probe").write_text("probe")
    said = subprocess.run(
        [sys.executable, "-I", "-S", node_facts.__file__, str(tmp_path / "probe")],
        capture_output=True,
        text=True,
    )
    answers = json.loads(said.stdout.removeprefix("facts "))
    assert (
        answers["shared"]
        and answers["versions"]["torch"] == "none"
        and answers["versions"]["python"] == node_facts.versions()["python"]
    )


def test_this_machine_is_examined_as_a_cluster_of_one(ray_cluster, tmp_path):
    console = Terminal(record=True, width=120)
    doctor(None, tmp_path / "runs", console)
    said = console.export_text()
    assert (
        f"{tmp_path}, seen by all" in said
        and "2 ranks over gloo: 64 KiB in" in said
        and "Nothing to fix." in said
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.proof
def test_a_host_with_storage_or_network_of_its_own_is_named_from_outside_the_cluster(hosts, tmp_path):
    fine = trifold(hosts, "doctor", str(tmp_path), "--address", hosts.jobs, COLUMNS="150")
    assert fine.returncode == 0 and "3 ranks over gloo" in fine.stdout and "Nothing to fix." in fine.stdout, (
        fine.stdout + fine.stderr
    )

    hosts.kill(2)
    hosts.start(2, alone=tmp_path, GLOO_SOCKET_IFNAME="lo")
    sick = trifold(hosts, "doctor", str(tmp_path), "--address", hosts.jobs, COLUMNS="150")
    assert sick.returncode == 1
    assert f"fix: host-2 does not see what host-0 wrote to {tmp_path}" in sick.stdout
    assert "fix: collectives on host-2 would use lo, where no other host reaches it" in sick.stdout


@pytest.mark.proof
def test_a_run_folder_that_the_head_does_not_see_is_refused_before_anything_is_submitted(hosts, tmp_path):
    recipe, runs = write_recipe(tmp_path / "mine", 10), tmp_path / "runs"
    runs.mkdir()
    trifold = f"{sys.executable} -m trifold.launch.cli"
    submit = f"mount -t tmpfs none {runs} && exec {trifold} submit {recipe} run={runs}/mine"
    said = subprocess.run(
        ["unshare", "-m", "sh", "-c", submit],
        env=hosts.environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert said.returncode == 1 and f"host-0 does not see what was written to {runs} here" in said.stderr, (
        said.stderr
    )


@pytest.mark.proof
def test_a_driver_without_the_clusters_token_is_told_so(hosts, tmp_path):
    (tmp_path / "token").write_text("not it")
    said = hosts.on(
        1,
        "env",
        f"RAY_AUTH_TOKEN_PATH={tmp_path}/token",
        sys.executable,
        "-m",
        "trifold.launch.cli",
        "doctor",
        "--address",
        hosts.address,
    )
    assert said.returncode == 1 and "it does not accept this token" in said.stderr, said.stderr
