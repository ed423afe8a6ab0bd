"""The benches race like with like: the peers compute the same loss on the same documents, and every piece
runs small.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.processes import run_processes
from tests.recipes import model_config
from trifold.launch.bench import contenders, data, gpu, rows
from trifold.launch.bench.report import show
from trifold.launch.recipe.reader import resolve
from trifold.launch.recipe.schema import PretrainRecipe
from trifold.launch.terminal import Terminal
from trifold.modeling.batch import IGNORE
from trifold.modeling.huggingface import export
from trifold.modeling.transformer import build
from trifold.pretrain.config.objectives import CausalConfig
from trifold.pretrain.distributed import RankInfo
from trifold.pretrain.storage.jsonl import read_lines

HERE = RankInfo.single()


def small(family: str) -> PretrainRecipe:
    return resolve(f"configs/demo/{family}.yaml", ["micro_rows=2", "step_rows=2", "engine.precision=fp32"])


@pytest.mark.parametrize("documents", [0, 3])
@pytest.mark.parametrize("family", ["decoder", "encoder", "encoder-decoder"])
def test_the_peer_computes_our_loss_on_the_same_documents(family: str, documents: int) -> None:
    recipe = small(family)
    micro = rows.micros(recipe, recipe.model.vocab_size, documents, 1, "cpu")[0]
    ours = build(model_config(recipe), 0)
    hf, state = export(model_config(recipe), ours.state_dict(), contenders.SPECIAL)
    theirs = contenders.stock_class(hf["architectures"][0], hf)
    theirs.load_state_dict(state, strict=False)
    theirs.tie_weights()
    batch = rows.one_by_one(micro.batch) if documents else micro.batch
    seen = (
        slice(None, -1) if family == "decoder" else slice(None)
    )  # the stock class shifts, and so loses each row's last target
    with torch.no_grad():
        mean = theirs.eval()(**contenders.stock_inputs(batch, shifts=family == "decoder")).loss.item()
        nll = ours(batch).nll
        assert nll.sum().item() == pytest.approx(ours(micro.batch).total.item(), rel=1e-4)
    assert mean == pytest.approx(
        (nll[:, seen].sum() / (batch.targets[:, seen] != IGNORE).sum()).item(), rel=1e-4
    )


def test_whole_rows_hold_one_document_and_packed_rows_about_as_many_as_were_asked_for() -> None:
    recipe = small("decoder")
    plain, packed = (rows.micros(recipe, recipe.model.vocab_size, n, 8, "cpu") for n in (0, 4))
    assert all(micro.batch.segments is None and micro.tokens == micro.batch.tokens.numel() for micro in plain)
    documents = [
        int(row.max()) for micro in packed if micro.batch.segments is not None for row in micro.batch.segments
    ]
    assert 2.5 < sum(documents) / len(documents) < 6


def test_a_contender_that_fails_is_a_result_and_the_others_go_on() -> None:
    def broken() -> Any:
        raise RuntimeError("no such kernel")

    def fine() -> Any:
        return torch.nn.Linear(2, 2), lambda i: torch.zeros(10).sum()

    racing = [
        contenders.Contender(name, make, 10, 10, 1.0) for name, make in (("broken", broken), ("fine", fine))
    ]
    contenders.race(racing, HERE, warmup=1, steps=3)
    assert racing[0].failed == "RuntimeError: no such kernel" and not racing[0].seconds
    assert len(racing[1].seconds) == 3


def test_rows_of_an_objective_are_made_at_a_measured_rate() -> None:
    found = data.making(
        resolve("configs/demo/decoder.yaml", ["step_rows=2", "micro_rows=1"]), "causal", CausalConfig(), 3
    )
    assert found["tokens/s"] > 0 and found["tokens"] > 0.9 * data.STEPS * 2 * 128


def test_a_table_is_also_a_json_file_and_a_chart(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with (tmp_path / "said").open("w") as said:
        show(
            Terminal(file=said),
            "speed",
            [{"": "theirs", "note": "failed"}, {"": "ours", "tokens/s": 1234.5}],
            tmp_path / "out",
        )
        show(Terminal(file=said), "speed", [{"": "ours", "note": "out of time"}], tmp_path / "nothing")
    assert "1,234" in (tmp_path / "said").read_text() or "1,235" in (tmp_path / "said").read_text()
    assert json.loads((tmp_path / "out.json").read_text())["rows"][1]["tokens/s"] == 1234.5
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "nothing.json").exists() and not (tmp_path / "nothing.png").exists()


def _contender(place: RankInfo, name: str, i: int, out: str) -> list[dict[str, Any]]:
    gpu.measure(name, i, Path(out), steps=1, tiny=True, rank_info=place)
    return read_lines(Path(out))


ALL = [(name, i) for name, shape in gpu.SHAPES.items() for i in range(len(shape.contenders))]


@pytest.mark.parametrize(
    ("name", "i"),
    [run if run[0].startswith("packed") else pytest.param(*run, marks=pytest.mark.proof) for run in ALL],
)
def test_each_contender_of_the_gpu_table_runs_small_on_the_cpu(name: str, i: int, tmp_path: Path) -> None:
    (line,) = run_processes(1, _contender, name, i, str(tmp_path / "rows.jsonl"))[0]
    assert line[""] == gpu.SHAPES[name].contenders[i]
    if line[""] == gpu.FP8:
        assert "requires a GPU" in line["note"]
    else:
        assert line["tokens/s"] > 0 and "note" not in line and "MFU %" not in line, line
