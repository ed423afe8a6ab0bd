"""Rows that real ranks share: gradients of one step beside plain torch on whole rows, a run that changes how
it shares, and refusals.
"""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests.modeling.families import CONFIGS
from tests.pretrain.data.small_corpus import SmallCorpus, SmallVocabulary
from tests.pretrain.data.small_corpus import recipe as small_recipe
from tests.pretrain.engine.sequence_recipes import CASES, of_family
from tests.pretrain.engine.small_engine import reader
from tests.processes import run_processes
from tests.recipes import model_config, recipe
from tests.training import losses, quiet, train_run, train_until
from trifold.launch.bench.rows import micros
from trifold.launch.recipe.reader import resolve
from trifold.modeling.config import ModelConfig
from trifold.modeling.errors import UserError
from trifold.modeling.generation.config import Generation
from trifold.modeling.transformer import build
from trifold.pretrain.config import training
from trifold.pretrain.config.pretraining import PretrainConfig
from trifold.pretrain.data.loader import Loader, StepRows
from trifold.pretrain.data.rows import Rows
from trifold.pretrain.data.stages import ResolvedStage
from trifold.pretrain.distributed import RankInfo, all_gather
from trifold.pretrain.engine.engine import Engine
from trifold.pretrain.run import prepare, train
from trifold.pretrain.storage.jsonl import read_lines

LSTM = ["model={family: decoder, cell: lstm, vocab_size: 400, dim: 32, num_layers: 1, max_positions: 256}"]
TWO = training.EngineConfig(sequence_parallel=2)


def _beside_plain_torch(rank_info: RankInfo) -> dict[Any, Any]:
    """Of each family and stage: loss and gradient of a step of two micros, and of a batch each loss, its
    logits and a text, by two ranks that share the rows; then by torch alone on whole rows.
    """
    found: dict[Any, Any] = {}
    for name in CASES:
        for stage in (1, 3):
            config = of_family(name, stage, sharing=2)
            made = micros(config, 301, 3, 2, "cpu")
            count = sum(micro.targets for micro in made)
            batches = [micro.batch for micro in made]
            engine = Engine(build(model_config(config), 0), config.engine, config.optimizer, rank_info)
            assert (engine.rank, engine.world, engine.counts) == (0, 1, rank_info.rank == 0)
            scores = (*engine.evaluate(batches[0]), engine.logits(batches[0]))
            prompts = [[7, 8, 9], [10, 11]] if name != "modernbert" else []
            texts = engine.generate(prompts, Generation(max_new=4), bos=1, eos=2, pad=0) if prompts else []
            step = engine.train_step(batches, [1, 2], count, 1.0)
            moments = reader(all_gather(engine.slices()))
            model = build(model_config(config), 0)
            (sum(model(batch).total for batch in batches) / count).backward()
            expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            grads = {
                n: moments(n, 0, None)["exp_avg"].view_as(grad) / (1 - config.optimizer.betas[0])
                for n, grad in expected.items()
            }
            with torch.no_grad():
                fresh = build(model_config(config), 0)
                wanted = (*fresh(batches[0])[1:], fresh.logits(batches[0]))
                loss = float(sum(fresh(batch).total for batch in batches) / count)
            found[name, stage] = (step, loss, grads, expected, scores, wanted, texts)
    return found


def _in_turns(rank_info: RankInfo, straight: PretrainConfig, moved: PretrainConfig) -> None:
    train(straight, rank_info)
    for stop, engine in (
        (4, TWO),
        (8, training.EngineConfig(zero_stage=2)),
        (12, TWO.model_copy(update={"zero_stage": 3})),
    ):
        train_until(rank_info, moved.model_copy(update={"engine": engine}), stop)


def two_runs(folder: Path) -> tuple[PretrainConfig, PretrainConfig]:
    sizes: dict[str, Any] = {
        "dim": 32,
        "num_layers": 2,
        "num_heads": 2,
        "num_kv_heads": 2,
        "head_dim": 16,
        "mlp_dim": 48,
    }
    model = ModelConfig(family="encoder-decoder", vocab_size=400, max_positions=64, **sizes)
    straight, moved = (recipe(folder, run, "encoder-decoder", model=model) for run in ("straight", "moved"))
    for config in (straight, moved):
        prepare(config, 1, quiet)
    return straight, moved


class Two(NamedTuple):
    """What each of two ranks found beside plain torch, and two runs that they made."""

    ranks: list[dict[Any, Any]]
    straight: PretrainConfig
    moved: PretrainConfig


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Two:
    runs = two_runs(tmp_path_factory.mktemp("shared"))
    return Two(run_processes(2, _all, *runs, timeout=280), *runs)


def _all(rank_info: RankInfo, straight: PretrainConfig, moved: PretrainConfig) -> dict[Any, Any]:
    _in_turns(rank_info, straight, moved)
    return _beside_plain_torch(rank_info)


def test_two_ranks_that_share_rows_take_the_step_of_plain_torch_on_whole_rows(two: Two) -> None:
    ranks = two.ranks
    for key, (step, loss, grads, expected, scores, wanted, texts) in ranks[0].items():
        assert step.loss == pytest.approx(loss, rel=1e-6), key
        largest = max(float(grad.abs().max()) for grad in expected.values())
        for name, grad in expected.items():
            torch.testing.assert_close(grads[name], grad, rtol=1e-3, atol=2e-6 * largest)
        norm = float(torch.stack([grad.square().sum() for grad in expected.values()]).sum().sqrt())
        assert step.grad_norm == pytest.approx(norm, rel=1e-5), key
        torch.testing.assert_close(scores[0], wanted[0], rtol=1e-4, atol=1e-5)
        assert scores[1].equal(wanted[1])
        torch.testing.assert_close(scores[2], wanted[2], rtol=1e-4, atol=1e-4)
        assert texts == ranks[1][key][-1] and (texts or key[0] == "modernbert")


def assert_same_run(straight: PretrainConfig, moved: PretrainConfig) -> None:
    assert [rows for _, rows in losses(straight.run).values()] == [
        rows for _, rows in losses(moved.run).values()
    ]
    for name in ("loss", "heldout_loss", "accuracy", "tokens", "heldout_targets"):
        lines = [
            [line for line in read_lines(Path(config.run) / "metrics.jsonl") if name in line]
            for config in (straight, moved)
        ]
        expected, found = ({line["step"]: line[name] for line in each} for each in lines)
        assert expected and found == pytest.approx(expected, rel=1e-5), name


def test_a_run_goes_on_whether_ranks_share_its_rows_or_not(two: Two) -> None:
    assert_same_run(two.straight, two.moved)


@pytest.mark.proof
def test_a_run_of_two_groups_goes_on_alone_and_as_one_group(tmp_path: Path) -> None:
    straight, moved = two_runs(tmp_path)
    run_processes(4, train_until, moved.model_copy(update={"engine": TWO}), 4)
    run_processes(1, train_until, moved, 8)
    run_processes(2, train_until, moved.model_copy(update={"engine": TWO}), 12)
    run_processes(1, train_run, straight)
    assert_same_run(straight, moved)


@pytest.mark.parametrize("dials", [*CASES.values()], ids=lambda dials: dials.kind)
def test_ranks_that_share_rows_are_dealt_the_same_and_one_of_them_counts(dials: Any) -> None:
    rows = Rows.for_training(small_recipe(dials), SmallVocabulary(), [SmallCorpus([5, 20, 40, 100] * 10)])

    def share(counts: bool) -> StepRows:
        return Loader(
            [rows], [ResolvedStage(32, 10, 3)], start=0, stop=4, rank=1, world=2, prefetch=1, counts=counts
        ).share(1)

    first, second = share(True), share(False)
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(first.micros, second.micros, strict=True))
    assert first.micro_indices == second.micro_indices and first.count > 0
    assert (second.count, second.tokens, second.hash) == (0, 0, 0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            ["engine.sequence_parallel=4", "cluster.workers=4"],
            r"num_kv_heads \(2\) must be a multiple of engine\.sequence_parallel \(4\)",
        ),
        (
            ["engine.sequence_parallel=3", "cluster.workers=3"],
            r"num_heads \(4\) must be a multiple of engine\.sequence_parallel \(3\)",
        ),
        (
            ["data.row_length=63"],
            r"data\.row_length \(63\) must be a multiple of engine\.sequence_parallel \(2\)",
        ),
        (
            ["stages=[{steps: 1, row_length: 31}]"],
            r"stages\.0\.row_length \(31\) must be a multiple of engine\.sequence_parallel \(2\)",
        ),
        (
            ["cluster.workers=3"],
            r"parallel \(2\) ranks share each row, and 3 ranks are not a multiple of that",
        ),
        (
            ["cluster.workers=4", "cluster.min_workers=1"],
            r"parallel \(2\) ranks share each row, and 1 ranks are not a multiple of that",
        ),
        (
            ["cluster.workers=0"],
            r"parallel \(2\) ranks share each row, and 1 ranks are not a multiple of that",
        ),
        (
            ["engine.compile=true", "engine.cuda_graphs=true"],
            r"capture the communication of sequence_parallel \(2\) ranks: set it to false",
        ),
        (
            LSTM,
            r"parallel \(2\) ranks share each row, and a model of cell lstm reads it position by"
            r" position: set it to 1",
        ),
    ],
    ids=lambda given: given[0] if isinstance(given, list) else "",
)
def test_what_cannot_be_shared_is_refused_with_both_numbers(changes: list[str], said: str) -> None:
    shared = ["cluster.workers=2", "engine.sequence_parallel=2", "model.num_heads=4", "model.num_kv_heads=2"]
    resolve("configs/demo/decoder.yaml", shared)
    with pytest.raises(UserError, match=said):
        resolve("configs/demo/decoder.yaml", [*shared, *changes])


def test_a_head_of_spans_is_not_shared() -> None:
    with pytest.raises(
        UserError,
        match=r"parallel \(2\) ranks share each row, and a span head compares all positions of a row: set it",
    ):
        TWO.check_model(CONFIGS["modernbert"].model_copy(update={"spans": True}))


def test_a_target_side_that_cannot_be_cut_up_is_refused_before_training() -> None:
    config = of_family("t5gemma", 1, 1).model_copy(
        update={"engine": training.EngineConfig(sequence_parallel=32)}
    )
    with pytest.raises(
        UserError,
        match=r"the target side of a row \(16\) must be a multiple of engine\.sequence_parallel \(32\)",
    ):
        micros(config, 301, 3, 1, "cpu")
