"""`trifold compare` on three tiny models: trained once, drawn, grown by one more; and what it refuses."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from tests.finetune.small_tasks import vocabulary, write_pairs
from tests.modeling.families import CONFIGS, RECURRENT
from tests.paths import ROOT
from trifold.finetune.run import open_rows
from trifold.finetune.tasks import open_tasks
from trifold.launch.cli import app
from trifold.launch.commands.finetune import finetune
from trifold.launch.compare import probes
from trifold.launch.compare.compare import _finished, comparable, compare
from trifold.launch.compare.measured import Point, Run, curve
from trifold.launch.compare.probes import Map, maps, reach
from trifold.launch.compare.report import write
from trifold.launch.recipe.reader import resolve_any
from trifold.launch.recipe.schema import FinetuneRecipe
from trifold.launch.terminal import Terminal
from trifold.modeling.batch import IGNORE, Batch
from trifold.modeling.errors import UserError
from trifold.modeling.transformer import build
from trifold.pretrain.data.collate import Row, stack
from trifold.pretrain.publish import published_folder
from trifold.pretrain.storage.jsonl import append_line, read_lines

pytest.importorskip("matplotlib")
CONFIGS_FOLDER = ROOT / "configs"
BOTH = {"family": "encoder-decoder", "vocab_size": 400, "num_layers": 1, "max_positions": 64}
SHAPES: dict[str, dict[str, Any]] = {
    "gru": BOTH | {"cell": "gru", "dim": 40},
    "gru-attention": BOTH | {"cell": "gru", "dim": 34, "alignment": "additive"},
    "transformer": BOTH
    | {"dim": 36, "num_heads": 2, "num_kv_heads": 2, "head_dim": 10, "mlp_dim": 56, "position": "rope"},
}


def recipes(folder: Path, names: list[str], **changes: Any) -> list[Any]:
    made = []
    vocabulary(folder)
    pairs = write_pairs(folder / "train", 40, 1)
    for name in names:
        values = {
            "run": str(folder / name),
            "model": {"config": SHAPES[name]},
            "tokenizer": {"path": str(folder / "vocabulary")},
            "task": {"kind": "translation", "train": [pairs], "dev": [pairs]},
            "row_length": 64,
            "steps": 2,
            "step_rows": 2,
            "micro_rows": 2,
            "optimizer": {"lr": 1e-3},
            "evaluate_every": 2,
            "checkpoints": {"every": 2},
            "evaluate_examples": 4,
            "generation": {"max_new": 8},
            "cluster": {"workers": 0, "threads_per_worker": 1},
        }
        file = folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(values | changes))
        made.append(resolve_any(file))
    return made


class Images(HTMLParser):
    """The pictures of a page, and whether it asks for anything from outside."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.captions: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        assert "href" not in given and str(given.get("src", "data:image/png;base64,")).startswith(
            "data:image/png;base64,"
        )
        if tag == "img":
            self.captions.append(str(given["alt"]))


def test_models_are_trained_once_drawn_and_joined_by_another(tmp_path: Path) -> None:
    console, out = Terminal(quiet=True), tmp_path / "out"
    page = compare(recipes(tmp_path, ["gru", "gru-attention"]), out, None, None, console)
    assert {file.name for file in out.iterdir()} == {"report.html", "report.json"} | {
        f"translation-{name}.png" for name in ("loss", "length", "reach", "speed", "gru-attention-looks")
    }
    before = {name: (tmp_path / name / "metrics.jsonl").read_bytes() for name in ("gru", "gru-attention")}
    compare(
        recipes(tmp_path, ["gru", "gru-attention", "transformer"]), out, "Mr Ada sees Bob.", "sees", console
    )
    assert all((tmp_path / name / "metrics.jsonl").read_bytes() == was for name, was in before.items())
    text = page.read_text()
    assert len(Images(text).captions) == 6 and all(f"<td>{name}</td>" in text for name in SHAPES)
    bleu = json.loads((tmp_path / "transformer" / "scores.json").read_text())["scores"]["bleu"]
    assert f"<td>{bleu:.2f} (" in text
    assert read_lines(tmp_path / "transformer" / "events.jsonl")[-1]["event"] == "scored"


def test_models_of_unlike_sizes_or_data_are_refused_with_both_numbers(tmp_path: Path) -> None:
    console = Terminal(quiet=True)
    a, b = recipes(tmp_path, ["gru", "transformer"])
    large = b.model_copy(
        update={
            "model": b.model.model_copy(update={"config": b.model.config.model_copy(update={"mlp_dim": 200})})
        }
    )
    with pytest.raises(
        UserError, match=r"transformer has 6\d,\d+ parameters and .*gru \d\d,\d+, .*% more: .* up to 10%"
    ):
        compare([a, large], tmp_path, None, None, console)
    with pytest.raises(UserError, match=r"steps is 2 in .*gru and 3 in .*transformer"):
        compare([a, b.model_copy(update={"steps": 3})], tmp_path, None, None, console)
    with pytest.raises(UserError, match=r"--word 'it' is not a word of the sentence 'A white dog\.'"):
        compare([a, b], tmp_path, "A white dog.", "it", console)
    with pytest.raises(UserError, match="two recipes have the run folder"):
        compare([a, a], tmp_path, None, None, console)


def test_a_finished_run_of_another_recipe_is_refused_or_scored_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes, "POSITIONS", 64)
    console, out, events = Terminal(quiet=True), tmp_path / "out", tmp_path / "gru" / "events.jsonl"
    compare(recipes(tmp_path, ["gru"]), out, None, None, console)
    with pytest.raises(UserError, match=r"optimizer\.lr: 0\.001 there, 0\.5 here"):
        compare(recipes(tmp_path, ["gru"], optimizer={"lr": 0.5}), out, None, None, console)
    assert all(_finished(recipe) for recipe in recipes(tmp_path, ["gru"], engine={"recompute": True}))
    compare(recipes(tmp_path, ["gru"], generation={"max_new": 1}), out, None, None, console)
    assert [line["event"] for line in read_lines(events)].count("scored") == 2
    assert all(len(line["prediction"]) < 12 for line in read_lines(tmp_path / "gru" / "predictions.jsonl"))


def test_models_that_learned_from_unlike_files_are_refused_and_what_is_finished_is_only_read(
    tmp_path: Path,
) -> None:
    console, out = Terminal(quiet=True), tmp_path / "out"
    gru, transformer = recipes(tmp_path, ["gru", "transformer"])
    compare([gru], out, None, None, console)
    write_pairs(tmp_path / "train", 40, 2)
    was = {file: file.read_bytes() for file in (tmp_path / "gru").rglob("*") if file.is_file()}
    compare([gru], out, None, None, console)
    for _ in range(2):  # once it was trained, and at once
        with pytest.raises(
            UserError,
            match=r"gru has rows of \w*fingerprint \w+, and .*transformer of \w+: .* Give one another `run`",
        ):
            compare([gru, transformer], out, None, None, console)
    assert {file: file.read_bytes() for file in (tmp_path / "gru").rglob("*") if file.is_file()} == was


def test_what_could_not_be_drawn_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    console, (a, b) = Terminal(quiet=True), recipes(tmp_path, ["gru", "gru-attention"])
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        compare([a, b], tmp_path / "file", None, None, console)
    alike = [r.model_copy(update={"run": str(tmp_path / part / "same")}) for r, part in ((a, "p"), (b, "q"))]
    with pytest.raises(UserError, match=r"p/same and .*q/same end in the same name"):
        compare(alike, tmp_path / "out", None, None, console)
    with pytest.raises(UserError, match="two recipes have the run folder"):
        compare(
            [a, a.model_copy(update={"run": f"{tmp_path}/x/../gru"})], tmp_path / "out", None, None, console
        )
    with pytest.raises(UserError, match="there is no recipe"):
        compare([], tmp_path / "out", None, None, console)
    assert not {"gru", "gru-attention", "p", "q"} & {path.name for path in tmp_path.iterdir()}


def test_what_is_looked_into_is_what_was_scored(tmp_path: Path) -> None:
    """The best step, averaged, with its adapters: not the newest weights."""
    steps: dict[str, Any] = {"steps": 3, "evaluate_every": 1, "checkpoints": {"every": 1}}
    [recipe] = recipes(
        tmp_path, ["transformer"], lora={"rank": 2}, ema=0.5, optimizer={"lr": 10.0}, best="chrf", **steps
    )
    finetune(recipe, Terminal(quiet=True))
    found = json.loads((tmp_path / "transformer" / "scores.json").read_text())
    assert found["step"] == 2
    model, words = probes.opened(tmp_path / "transformer"), vocabulary(tmp_path)
    rows = open_rows(recipe, open_tasks(recipe, words, "encoder-decoder"), words)[1]
    batch = stack([rows.row(i) for i in range(rows.num_rows)])
    with torch.no_grad():
        loss = model(batch).total / (batch.targets != IGNORE).sum()
    assert abs(loss.item() - found["heldout_loss"]) < 1e-5


def test_pieces_that_look_like_formulas_are_drawn_as_they_are(tmp_path: Path) -> None:
    shown = Map("every head, from '$$'", ["$$", "a"], ["$^$", "a"], [[0.0, 1.0], [1.0, 0.0]])
    run = Run("r", "translation", "gru", True, True, 1, 1, [], {}, [], [], {16: 1.0}, [shown])
    write(tmp_path, [run])
    assert (tmp_path / "translation-r-looks.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "names", ["world-*.yaml", "multi30k-*.yaml", "wnut17-*.yaml", "broad-twitter-*.yaml"]
)
def test_the_shipped_recipes_are_comparable(
    names: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIFOLD_DATA", "data")
    monkeypatch.chdir(tmp_path)
    files = sorted((CONFIGS_FOLDER / "compare").glob(names))
    assert len(files) > 2
    found: list[Any] = [resolve_any(file) for file in files]
    for file, recipe in zip(files, found, strict=True):
        if (
            isinstance(recipe, FinetuneRecipe) and recipe.model.folder is not None
        ):  # of the tweets' recipe of that name, published
            shape = resolve_any(file.with_name(file.name.replace("wnut17", "broad-twitter"))).model.config
            folder, words = Path(recipe.model.folder), vocabulary(tmp_path)
            folder.mkdir(parents=True)
            published_folder.write_folder(folder, shape, build(shape, 1).state_dict(), words)
            published_folder.write_record(folder, shape, words, "no data", {})
    comparable(found)


def test_the_world_that_is_written_is_what_its_recipes_learn_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(app, ["world"]).exit_code == 0
    for file in (CONFIGS_FOLDER / "compare").glob("world-*.yaml"):
        recipe = resolve_any(file)
        if isinstance(recipe, FinetuneRecipe):
            places = [
                Path(place) for pair in (*recipe.task.train, *recipe.task.dev) for place in pair.split(",")
            ]
        else:
            places = [Path(source.path) for source in (*recipe.data.sources, *recipe.data.heldout)]
        assert all(place.stat().st_size > 1000 for place in places)


def test_a_curve_counts_what_was_spent_and_the_last_of_a_step_that_was_done_twice(tmp_path: Path) -> None:
    for step, seconds, cpu in ((1, 5.0, 4.0), (2, 9.0, 9.0), (2, 3.0, 2.0), (3, 1.0, 0.5)):
        append_line(
            tmp_path / "metrics.jsonl",
            {"step": step, "seconds": seconds, "cpu_seconds": cpu, "tokens": 10 * step},
        )
    for step, loss in ((0, 6.0), (2, 5.5), (2, 5.0), (3, 4.0)):
        append_line(tmp_path / "metrics.jsonl", {"step": step, "heldout_loss": loss})
    assert curve(tmp_path) == [Point(0, 0.0, 0.0, 6.0), Point(20, 8.0, 6.0, 5.0), Point(30, 9.0, 6.5, 4.0)]


class OneDocument:
    """Rows of one document each, always the same tokens."""

    num_rows, targets_per_byte, parts = 8, None, ()

    def row(self, i: int) -> Row:
        tokens = torch.arange(12)
        return Row(tokens.numpy(), torch.ones_like(tokens).numpy(), tokens.numpy())

    def empty_row(self) -> Row:
        raise NotImplementedError


def test_reach_is_the_gradient_of_the_last_loss_by_distance() -> None:
    """Against finite differences of the embedding of one token."""
    model = build(RECURRENT["lstm decoder"], 1).double().eval()
    rows: Any = OneDocument()
    found = reach(model, rows)
    tokens = torch.arange(12)[None]
    x = model.embedded(tokens).detach()
    assert model.decoder is not None

    def loss(at: int, dim: int, by: float) -> torch.Tensor:
        moved = x.clone()
        moved[0, at, dim] += by
        return torch.nn.functional.cross_entropy(
            model.head.logits(model.decoder(moved, None)[:, -1], model.embed), tokens[:, -1]
        )

    norms = [
        sum(((loss(at, d, 1e-5) - loss(at, d, -1e-5)) / 2e-5).detach() ** 2 for d in range(32)) ** 0.5
        for at in (11, 10, 5)
    ]
    torch.testing.assert_close(
        torch.tensor([found[d] for d in (0, 1, 6)]).double(),
        torch.stack(norms) / norms[0],
        rtol=1e-4,
        atol=1e-7,
    )


@pytest.mark.parametrize("name", ["llama", "t5gemma", "modernbert", "t5"])
def test_the_weights_that_are_drawn_are_those_that_the_kernel_uses(name: str) -> None:
    """Weights times values, through the output map, are the layer's output."""
    model = build(CONFIGS[name], 1).eval()
    tokens = torch.arange(3, 12)[None]
    ones = torch.ones_like(tokens)
    batch = Batch(
        tokens,
        ones,
        tokens,
        *((tokens.flip(1), ones) if model.decoder is not None and model.encoder is not None else ()),
    )
    checked = []

    def check(module: Any, given: Any, result: torch.Tensor) -> None:
        x, view = given[:2]
        values = module._heads(module.v(x if view.memory_BSD is None else view.memory_BSD))
        weights = module.weights(x, view)
        mixed = weights @ values.repeat_interleave(weights.shape[1] // values.shape[1], dim=1)
        torch.testing.assert_close(module.o(mixed.transpose(1, 2).flatten(2)), result, rtol=1e-4, atol=1e-5)
        checked.append(weights.sum(-1))

    for module in model.modules():
        if type(module).__name__ == "Attention":
            module.register_forward_hook(check)
    with torch.no_grad():
        model.logits(batch)
    assert checked and all(torch.allclose(total, torch.ones_like(total)) for total in checked)


@pytest.mark.parametrize("name", ["llama", "t5gemma"])
def test_a_word_is_looked_from_by_every_head_that_reads_the_sentence(name: str, tmp_path: Path) -> None:
    words = vocabulary(tmp_path)
    model = build(CONFIGS[name].model_copy(update={"vocab_size": words.vocab_size}), 1).eval()
    found = maps(model, words, "Mr Ada sees Bob.", "Ada")
    *_, last, every = found
    assert len(every.rows) == model.config.num_layers * model.config.num_heads == len(every.weights)
    assert "Ada" in last.rows and every.weights[-1] == last.weights[last.rows.index("Ada")]
    assert len(maps(model, words, "Mr Ada sees Bob.")) == len(found) - 1


@pytest.mark.parametrize(
    "changes", [{"labels": ("O", "B-PER", "I-PER")}, {"labels": ("O", "B-PER"), "crf": True}, {"spans": True}]
)
def test_speed_is_measured_of_every_head(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "POSITIONS", 64)
    assert all(
        rate > 0 for rate in probes.speed(RECURRENT["lstm encoder"].model_copy(update=changes)).values()
    )


def test_what_has_nothing_to_look_with_gives_no_map(tmp_path: Path) -> None:
    words = vocabulary(tmp_path)
    for name, titles in (
        ("lstm decoder", []),
        ("rnn fixed vector", []),
        ("lstm additive", ["alignment"]),
        ("gru hard", ["alignment"]),
    ):
        model = build(RECURRENT[name].model_copy(update={"vocab_size": words.vocab_size}), 1).eval()
        found = maps(model, words, "Mr Ada sees Bob.")
        assert [m.title for m in found] == titles
        assert all(
            abs(sum(row) - 1) < 1e-5 and len(row) == len(m.columns) for m in found for row in m.weights
        )
        assert all(len(m.weights) == len(m.rows) for m in found)
