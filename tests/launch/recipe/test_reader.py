"""Recipes are read strictly: each mistake is one sentence that names the place, the value and what is
allowed.
"""

import json
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trifold.launch.recipe.errors import known_keys
from trifold.launch.recipe.reader import CLONE, resolve, resolve_any, write
from trifold.launch.recipe.schema import FinetuneRecipe, PretrainRecipe
from trifold.launch.terminal import mask_secrets, visible
from trifold.modeling.errors import UserError

RECIPE = """
run: runs/x
model: {family: decoder, vocab_size: 512, dim: 32, num_layers: 2, num_heads: 2, num_kv_heads: 2, head_dim: 16,
  mlp_dim: 64, max_positions: 128}
data:
  sources: [{path: a.txt}]
  heldout_fraction: 0.1
  row_length: 128
objective: {kind: causal}
optimizer: {lr: 1e-3}
steps: 10
step_rows: 4
micro_rows: 2
"""


@pytest.fixture
def recipe(tmp_path) -> Path:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path / "recipe.yaml"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lrr=1", "there is no key `optimizer.lrr`; did you mean `optimizer.lr`?"),
        ("lr=1", "there is no key `lr`; did you mean `optimizer.lr`?"),
        ("seed=" + "[" * 100_000, "a recipe is nested at most 50 levels deep."),
        ("objective.rate=0.1", "there is no key `objective.rate`; did you mean `objective.parts.0.rate`?"),
        ("scoring.held_out.novels=[{paht: x}]", "`scoring.held_out.novels.0.path`?"),
        ("scoring={held_out: {a: [{path: x}]}, tasks: {a: y}}", "'a' prefixes the names of its scores"),
        (
            "data.sources.0.paht=x",
            "there is no key `data.sources.0.paht`; did you mean `data.sources.0.path`?",
        ),
        ("steps=0", "`steps` is 0 (a whole number); it must be a whole number, above 0."),
        ("steps=1e3", "`steps` is 1000.0 (a number); it must be a whole number, above 0."),
        ("steps=true", "`steps` is true (true or false); it must be a whole number"),
        ("steps=010", '`steps` is "010" (text); it must be a whole number'),
        (
            "model.dropout=1",
            "`model.dropout` is 1 (a whole number); it must be a number, at least 0 and below 1.",
        ),
        ("optimizer.lr=fast", '`optimizer.lr` is "fast" (text); it must be a number, above 0.'),
        ("optimizer.lr=.inf", '`optimizer.lr` is ".inf" (text); it must be a number'),
        ("optimizer.lr=1e400", "`optimizer.lr` is Infinity (a number); it must be a number, above 0."),
        ("optimizer.betas=[2, -1]", "`optimizer`: betas [2.0, -1.0] must each be at least 0 and below 1."),
        ("run=''", '`run` is "" (text); it must be text, its length at least 1.'),
        ("optimizer.betas=[0.9]", "`optimizer.betas.1` is missing; it must be a number."),
        ("engine.precision=bf17", "it must be one of auto, fp32, bf16, autocast. Did you mean bf16?"),
        (
            "objective.kind=casual",
            '`objective.kind` is "casual" (text); it must be one of causal, prefix, fim, masked, spans,'
            " continuation, infilling, mixture."
            " Did you mean causal?",
        ),
        (
            "objective={}",
            "`objective.kind` is missing; it must be one of causal, prefix, fim, masked, spans,"
            " continuation, infilling, mixture.",
        ),
        ("objective.kind=masked", "the masked objective trains a model of family encoder, not decoder."),
        (
            "objective={kind: mixture, parts: [{kind: causal}, {kind: spans}]}",
            "`objective`: the parts of a mixture must train one family of models, but causal trains family"
            " decoder, spans trains family",
        ),
        ("objective={kind: mixture, parts: [{kind: causal}]}", "`objective.parts` is [{"),
        (
            "objective={kind: mixture, parts: [{kind: causal, weigth: 2}, {kind: fim}]}",
            "did you mean `objective.parts.0.weight`?",
        ),
        (
            "objective={kind: mixture, parts: [{kind: fim, suffix_first: 2}, {kind: causal}]}",
            "`objective.parts.0.suffix_first` is 2 (a whole number); it must be a number, at least 0 and at"
            " most 1.",
        ),
        (
            "objective={kind: mixture, parts: [{kind: fmi}, {kind: causal}]}",
            "one of causal, prefix, fim, masked, spans, continuation, infilling. D",
        ),
        (  # a folder has its own shape
            "model.from=f",
            "`model` has no keys family, vocab_size, dim, num_layers, num_heads, num_kv_heads, head_dim,"
            " mlp_dim, max_positions; with what"
            " else it says, it has from, random, config, dropout, label_smoothing.",
        ),
        ("model={from: f, randon: true}", "there is no key `model.randon`; did you mean `model.random`?"),
        (
            "model={from: f, dropout: 2}",
            "`model.dropout` is 2 (a whole number); it must be a number, at least 0 and below 1 or null.",
        ),
        ("model=3", "`model` is 3 (a whole number); it must be a mapping of keys to values."),
        ("data.sources=[]", "`data.sources` is [] (a list); it must be a list, its length at least 1."),
        ("data.sources.0.hub=y", "`data.sources.0`: a source has either `path` or `hub`, not both."),
        ("data.sources.1.path=b", "`1` is not a position in a list of 1, counted from 0."),
        ("run.x=1", 'goes through `run`, which holds "runs/x" (text)'),
        ("model.num_kv_heads=3", "`model`: num_heads (2) must be a multiple of num_kv_heads (3)."),
        ("micro_rows=8", "micro_rows (8) exceeds step_rows (4)."),
        (
            "cluster.workers=-1",
            "`cluster.workers` is -1 (a whole number); it must be a whole number, at least 0.",
        ),
        ("run=${TRIFOLD_NOT_SET}", "the environment variable TRIFOLD_NOT_SET is not set"),
        ("run=${HOME}/x", "recipes read only environment variables whose name begins with TRIFOLD_."),
        ("run=~nobody-of-this-name/x", "there is no such home folder"),
        ("data.sources.².path=x", "is not a position in a list of 1"),
        ('run="a\\0b"', "which holds a NUL or is not valid Unicode"),
        ('run="\\ud800"', "which holds a NUL or is not valid Unicode"),
        ("steps=!!int ''", "a recipe has no tags such as tag:yaml.org,2002:int"),
        ("a" + ".a" * 10_000 + "=1", "goes through more than 50 keys"),
        ("steps", "is not of the form key=value"),
        ("steps=[1", "expected ',' or ']'"),
    ],
)
def test_each_mistake_is_refused_in_one_sentence(recipe, override, message):
    with pytest.raises(UserError) as refusal:
        resolve(recipe, [override])
    assert message in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1


def test_a_prompt_without_a_place_for_the_text_is_refused(monkeypatch):
    monkeypatch.setenv("TRIFOLD_DATA", "data")
    with pytest.raises(UserError) as refusal:
        resolve("configs/finetune/multi30k.yaml", ["task.prompt=Translate"], FinetuneRecipe)
    assert "`task.prompt`: 'Translate' has no {source} in it, where each text is to stand." in str(
        refusal.value
    )


def test_a_recipe_of_the_other_command_is_refused_with_the_name_of_its_own():
    with pytest.raises(
        UserError,
        match=r"tags\.yaml is a fine-tuning recipe: use `trifold finetune`\.$",
    ):
        resolve("configs/demo/tags.yaml")
    with pytest.raises(
        UserError,
        match=r"encoder\.yaml is a pretraining recipe: use `trifold pretrain`\.$",
    ):
        resolve("configs/demo/encoder.yaml", kind=FinetuneRecipe)


def test_all_mistakes_are_listed_with_where_each_was_said(recipe, tmp_path):
    child = tmp_path / "child.yaml"
    child.write_text("extends: recipe.yaml\noptimizer: {lrr: 3}\n")
    with pytest.raises(UserError) as refusal:
        resolve(child, ["steps=0"])
    lines = sorted(str(refusal.value).splitlines())
    assert lines[0].startswith(f"{child}: there is no key `optimizer.lrr`")
    assert lines[1].startswith("the override steps=0: `steps` is 0")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: a\nsteps: 1\nrun: b\n", "line 3: `run` is already given in line 1."),
        ("- 1\n", "holds [1] (a list); a recipe is a mapping"),
        ("a: [1\nb: 2", "line 2: "),
        ("extends: nowhere.yaml\n", 'extends names "nowhere.yaml" (text); there is no such file'),
        ("extends: 5\n", "extends names 5 (a whole number); there is no such file"),
        ("run: !!timestamp 2026-11-20\n", "a recipe has no tags such as tag:yaml.org,2002:timestamp"),
        ("extends: broken.yaml\n", "extends itself: broken.yaml -> broken.yaml"),
        ("a: !!python/object/apply:os.getcwd []\n", "a recipe has no tags such as tag:yaml.org,2002:python/"),
        ("? [a, b]\n: 1\n", "a key must be plain text"),
    ],
)
def test_broken_files_are_refused_by_name_and_line(tmp_path, text, message):
    (tmp_path / "broken.yaml").write_text(text)
    with pytest.raises(UserError, match=re.escape(message)) as refusal:
        resolve(tmp_path / "broken.yaml")
    assert "broken.yaml" in str(refusal.value)


def test_missing_and_binary_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="there is no recipe"):
        resolve(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"binary\.yaml cannot be read as UTF-8"):
        resolve(tmp_path / "binary.yaml")


def test_the_recipe_in_a_run_folder_means_that_run_wherever_it_was_moved(recipe, tmp_path):
    run = tmp_path / "moved"
    run.mkdir(parents=True, exist_ok=True)
    (run / "events.jsonl").touch()
    write(resolve(recipe), run / "config.yaml")
    assert resolve(run / "config.yaml").run == str(run)
    assert resolve(run / "config.yaml", ["run=runs/another"]).run == "runs/another"
    (run / "events.jsonl").unlink()  # not a run: a recipe that happens to have this name
    assert resolve(run / "config.yaml").run == resolve(recipe).run


def test_extends_merges_mappings_and_replaces_lists(recipe, tmp_path):
    (tmp_path / "other.yaml").write_text("steps: 99\nengine: {zero_stage: 2, offload: true}\n")
    (tmp_path / "child.yaml").write_text(
        "extends: [recipe.yaml, other.yaml]\nengine: {zero_stage: 3}\ndata: {sources: [{path: b.txt}, {path:"
        " c.txt}]}\n"
    )
    child = resolve(tmp_path / "child.yaml")
    assert (child.steps, child.engine.zero_stage, child.engine.offload) == (99, 3, True)
    assert [source.path for source in child.data.sources] == ["b.txt", "c.txt"]
    assert child.data.row_length == 128


def test_overrides_and_environment_reach_every_place(recipe, monkeypatch):
    monkeypatch.setenv("TRIFOLD_BOOKS", "/books")
    made = resolve(
        recipe,
        [
            "optimizer.lr=3e-4",
            "data.sources.0.path=${TRIFOLD_BOOKS}/x.txt",
            "optimizer.betas=[0.8, 0.9]",
            "model.vocab_size=1_000",
        ],
    )
    assert (made.optimizer.lr, made.data.sources[0].path, made.optimizer.betas, made.model.vocab_size) == (
        3e-4,
        "/books/x.txt",
        (0.8, 0.9),
        1000,
    )


def test_plain_values_are_read_as_in_yaml_1_2(recipe):
    made = resolve(recipe, ["run=no", "data.sources.0.split=2026-11-20", "optimizer.eps=1e-8"])
    assert (made.run, made.data.sources[0].split, made.optimizer.eps) == ("no", "2026-11-20", 1e-8)


def test_resolved_recipe_reads_back_equal(recipe, tmp_path):
    made = resolve(recipe, ["optimizer.lr=1e-5", "run=naïve"])
    write(made, tmp_path / "run" / "config.yaml")
    assert resolve(tmp_path / "run" / "config.yaml") == made


RUNNABLE = [
    file.relative_to(CLONE)
    for files in ("pretrain/*.yaml", "demo/*coder.yaml")
    for file in sorted((CLONE / "configs").glob(files))
]


@pytest.mark.parametrize("file", RUNNABLE, ids=str)
def test_every_shipped_recipe_resolves_from_anywhere(file, monkeypatch, tmp_path):
    monkeypatch.setenv("TRIFOLD_DATA", "/data")
    monkeypatch.chdir(tmp_path)
    assert resolve(file).steps > 0
    assert (CLONE / file).read_text().startswith("# "), (
        "a recipe's header says command, hardware, time and result"
    )


SHIPPED = {
    file.relative_to(CLONE)
    for files in ("finetune/*.yaml", "demo/*.yaml")
    for file in (CLONE / "configs").glob(files)
}
TASKS = sorted(file for file in SHIPPED.difference(RUNNABLE) if file.stem not in ("small", "world"))


@pytest.mark.parametrize("file", TASKS, ids=str)
def test_every_shipped_task_resolves_and_reads_back(file, monkeypatch, tmp_path):
    monkeypatch.setenv("TRIFOLD_DATA", "/data")
    made = resolve(file, ["model.random=true"], FinetuneRecipe)
    write(made, tmp_path / "config.yaml")
    assert resolve(tmp_path / "config.yaml", kind=FinetuneRecipe) == made
    assert (CLONE / file).read_text().startswith("# ")
    with pytest.raises(UserError, match=r"no key `model.form`; did you mean `model.from`"):
        resolve(file, ["model.form=x"], FinetuneRecipe)


@pytest.mark.parametrize(
    "file", sorted((CLONE / "configs" / "model").glob("*.yaml")), ids=lambda file: file.stem
)
def test_every_shipped_model_resolves_in_a_recipe(file, tmp_path):
    family = yaml.safe_load(file.read_text())["model"]["family"]
    kind = {"encoder": "masked", "decoder": "causal", "encoder-decoder": "spans"}[family]
    text = re.sub(r"model: .*\n.*\n", "", RECIPE).replace("causal", kind)
    (tmp_path / "recipe.yaml").write_text(f"extends: {file}\n{text}")
    assert resolve(tmp_path / "recipe.yaml").model.dim > 0


PLAN = """
import atexit, resource, sys
from pathlib import Path

def report():
    times = resource.getrusage(resource.RUSAGE_SELF)
    [peak] = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")]
    Path(sys.argv[1]).write_text(f"{times.ru_utime + times.ru_stime} {int(peak) * 1024}")

atexit.register(report)
from trifold.launch.cli import main
main(["plan", *sys.argv[2:]])
"""


def resources(folder: Path, *arguments: str) -> tuple[str, float, int]:
    """The output of resolving a recipe in a process of its own, its seconds of CPU, and its peak memory in
    bytes. (ru_maxrss would be that of the process which started it, where that is larger.)
    """
    command = [sys.executable, "-c", PLAN, str(folder / "used"), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    seconds, peak = (folder / "used").read_text().split()
    return done.stdout, float(seconds), int(peak)


HEAVY = {
    "bomb": "\n".join(
        f"{c}: &{c} [{','.join([f'*{b}' if b else 'x'] * 9)}]" for b, c in pairwise([None, *"abcdefghi"])
    ),
    "bombmap": "\n".join(
        f"{c}: &{c} {{{','.join(f'{k}: ' + (f'*{b}' if b else 'x') for k in 'klmnopqrs')}}}"
        for b, c in pairwise([None, *"abcdefghi"])
    ),
    "itself": "a: &a [*a]",
    "keys": "\n".join(f"key{i}: {i}" for i in range(200_000)),
    "fewer keys": "\n".join(f"key{i}: {i}" for i in range(9_000)),
    "nested": "a: " + "{a: " * 100_000,
    "long text": "run: " + "x" * 900_000,
    "many mistakes": "stages: [" + ", ".join(["{step: 1}"] * 4_000) + "]",
}


@pytest.mark.parametrize("name", HEAVY)
def test_a_recipe_that_would_take_memory_or_time_is_a_short_message(tmp_path, name):
    (tmp_path / "heavy.yaml").write_text(RECIPE + HEAVY[name] + "\n")
    output, seconds, peak = resources(tmp_path, str(tmp_path / "heavy.yaml"))
    assert "heavy.yaml" in output and "Traceback" not in output
    assert len(output) < 30_000 and output.startswith("trifold: ")
    assert seconds < 5 and peak < 500e6


def test_files_that_extend_each_other_as_diamonds_are_read_once(recipe, tmp_path):
    for i in range(40):
        base = "recipe.yaml" if i == 0 else f"level{i - 1}.yaml"
        (tmp_path / f"level{i}.yaml").write_text(f"extends: [{base}, {base}]\nsteps: {i + 1}\n")
    assert resolve(tmp_path / "level39.yaml").steps == 40
    (tmp_path / "wide.yaml").write_text(f"extends: [{', '.join(['recipe.yaml'] * 101)}]\n")
    with pytest.raises(UserError, match="a recipe extends at most 100 files"):
        resolve(tmp_path / "wide.yaml")


def test_an_override_changes_one_place_of_what_aliases_share(tmp_path):
    (tmp_path / "shared.yaml").write_text(
        RECIPE.replace("[{path: a.txt}]", "[&a {path: a.txt}, *a]").replace("model: {", "model: &m {")
    )
    config = resolve(tmp_path / "shared.yaml", ["data.sources.1.path=b.txt"])
    assert [source.path for source in config.data.sources] == ["a.txt", "b.txt"]


@pytest.mark.parametrize("key", ["run", "data.cache", "tokenizer.path", "checkpoints.storage"])
def test_a_path_that_begins_with_a_tilde_is_in_the_home_folder(recipe, monkeypatch, tmp_path, key):
    monkeypatch.setenv("HOME", str(tmp_path))
    value: Any = resolve(recipe, [f"{key}=~/x"]).model_dump(mode="json")
    for name in key.split("."):
        value = value[name]
    assert value == str(tmp_path / "x")


@pytest.mark.parametrize(
    "secret",
    [
        "s3://AKIAKEY:SeCrEt/with+slash@bucket/x",
        "https://user:SeCrEt@host/x.txt",
        "https://SeCrEt0123456789abcd@host/x.txt",
        "https://host/x?X-Amz-Signature=SeCrEt",
        "SeCrEt-of-the-environment",
    ],
)
def test_credentials_are_rejected_and_masked(recipe, monkeypatch, secret):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "SeCrEt-of-the-environment")
    monkeypatch.setenv("TRIFOLD_PLACE", secret)
    for override in (f"checkpoints.storage={secret}", "data.sources.0.path=${TRIFOLD_PLACE}"):
        with pytest.raises(UserError, match="holds a password or key") as error:
            resolve(recipe, [override])
        assert "SeCrEt" not in visible(str(error.value))
    assert mask_secrets("http://host:8080/a@b s3://bucket/key") == "http://host:8080/a@b s3://bucket/key"


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
_KEYS = sorted(
    {key.replace(".0", "") for kind in (PretrainRecipe, FinetuneRecipe) for key in known_keys(kind)}
)


def _resolve_or_reject(file: Path, overrides: list[str]) -> None:
    try:
        config = resolve_any(file, overrides)
    except UserError as error:
        assert 0 < len(str(error)) < 25_000
        return
    write(config, file.parent / "again.yaml")
    assert resolve_any(file.parent / "again.yaml") == config


def _fuzz_values(folder: Path, examples: int) -> None:
    file = folder / "recipe.yaml"

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.tuples(st.sampled_from(_KEYS), _VALUES), min_size=1, max_size=3))
    def fuzz(pairs: list[tuple[str, Any]]) -> None:
        file.write_text(RECIPE)
        _resolve_or_reject(file, [f"{key}={json.dumps(value)}" for key, value in pairs])

    fuzz()


def _fuzz_text(folder: Path, examples: int) -> None:
    file = folder / "recipe.yaml"
    pieces = [
        "a",
        "run",
        "extends",
        "data",
        "model",
        ": ",
        "- ",
        "{",
        "}",
        "[",
        "]",
        ",",
        "\n",
        "  ",
        "&a ",
        "*a",
    ]
    pieces += [
        "!!int ",
        "!",
        "<<",
        "|",
        ">",
        "'",
        '"',
        "${TRIFOLD_X}",
        "~",
        "1e400",
        "0x1",
        "%",
        "@",
        "`",
        "\x85",
        "#",
    ]
    words = st.lists(st.sampled_from(pieces) | st.text(max_size=3), max_size=30).map("".join)

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(words, words, st.booleans())
    def fuzz(text: str, override: str, whole: bool) -> None:
        file.write_bytes((text if whole else RECIPE + text).encode("utf-8", "surrogatepass"))
        _resolve_or_reject(file, [override])
        _resolve_or_reject(file, [])

    fuzz()


def test_any_values_resolve_or_are_rejected_in_sentences(tmp_path):
    _fuzz_values(tmp_path, 200)


def test_any_text_resolves_or_is_rejected_in_sentences(tmp_path):
    _fuzz_text(tmp_path, 200)


@pytest.mark.proof
def test_many_more_recipes_resolve_or_are_rejected_in_sentences(tmp_path):
    _fuzz_values(tmp_path, 20_000)
    _fuzz_text(tmp_path, 20_000)
