"""The files in configs/cluster/ are what their readers accept: Ray's own validator, KubeRay's published
schemas, a shell.
"""

import copy
import gzip
import re
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.hosts import HEALTH
from trifold.launch.recipe.reader import CLONE

FILES = CLONE / "configs" / "cluster"
SCHEMAS = CLONE.parent / "shared" / "schemas"


@pytest.mark.parametrize("name", ["hosts", "aws"])
def test_ray_up_accepts_the_file(name: str) -> None:
    config = yaml.safe_load((FILES / f"{name}.yaml").read_text())
    validate_config(prepare_config(copy.deepcopy(config)))
    if name == "hosts":
        assert config["min_workers"] == len(config["provider"]["worker_ips"])


def strict(schema: Any) -> Any:
    """A CustomResourceDefinition's schema under which an unknown key is an error; Kubernetes itself drops it
    without a word.
    """
    if isinstance(schema, list):
        return [strict(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    if "properties" in made and not made.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    if made.pop("x-kubernetes-int-or-string", False):
        made.pop("type", None)
    return made


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob"])
def test_kuberay_knows_every_key_of_the_file(kind: str) -> None:
    file = SCHEMAS / f"ray.io_{kind.lower()}s.yaml.gz"
    if not file.exists():
        pytest.skip(f"KubeRay's schemas are not at {SCHEMAS}")
    versions = yaml.load(gzip.decompress(file.read_bytes()), yaml.CSafeLoader)["spec"][
        "versions"
    ]  # a megabyte: the C one, 10 times as fast
    schema = strict(
        next(version for version in versions if version["name"] == "v1")["schema"]["openAPIV3Schema"]
    )
    schema["properties"]["metadata"] = {"type": "object"}
    config = yaml.safe_load((FILES / f"{kind.lower()}.yaml").read_text())
    jsonschema.validate(config, schema)
    config["spec"]["entrypiont"] = "misspelt"
    with pytest.raises(jsonschema.ValidationError, match="entrypiont"):
        jsonschema.validate(config, schema)


def test_the_slurm_script_is_a_shell_script() -> None:
    done = subprocess.run(["bash", "-n", FILES / "slurm.sh"], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr


@pytest.mark.parametrize("file", sorted(FILES.iterdir()), ids=lambda file: file.name)
def test_every_cluster_wants_a_token_and_notices_a_dead_host_within_the_budget(file: Path) -> None:
    text = file.read_text()
    assert re.search(r"RAY_AUTH_MODE=token|authOptions: \{mode: token\}", text)
    for name, value in HEALTH.items():
        assert re.search(rf'RAY_health_check_{name}(=|, value: "){value}\b', text), name
    worst = (HEALTH["period_ms"] + HEALTH["timeout_ms"]) * HEALTH["failure_threshold"]
    assert HEALTH["initial_delay_ms"] + worst <= 15_000
