"""The command line: `trifold COMMAND ...`. What a person asked wrongly is one clear message and exit 1; a
defect keeps its traceback.

Each command imports what it needs when it runs, so that `trifold --help` answers at once.
"""

import errno
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from trifold.launch.bench.commands import app as bench
from trifold.launch.commands.jobs_cli import Changes, Config
from trifold.launch.commands.jobs_cli import app as jobs
from trifold.launch.recipe.reader import resolve, resolve_any
from trifold.launch.recipe.schema import FinetuneRecipe, PretrainRecipe
from trifold.modeling.errors import UserError

# a full disk, a folder that may not be written or is a file: not a defect, though nobody asked for it
MACHINE = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.EISDIR,
)

Published = Annotated[Path, typer.Argument(help="a published folder")]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Pretrain the three transformer families, through any failure.",
)

app.add_typer(bench, name="bench")
app.add_typer(jobs)


@app.command()
def tokenizer(recipe: Config, changes: Changes = None) -> None:
    """Train the SentencePiece model the recipe names."""
    from trifold.launch.commands.pretrain import make_tokenizer

    made = make_tokenizer(_resolve(recipe, changes), Console())
    Console().print(f"{made.vocab_size} pieces, fingerprint {made.fingerprint}", highlight=False)


@app.command()
def prepare(
    recipe: Config,
    changes: Changes = None,
    address: Annotated[
        str | None, typer.Option(help="a Ray cluster whose nodes tokenize; without it this machine does")
    ] = None,
) -> None:
    """Turn the corpus into token shards (pretrain does it when they are missing)."""
    from trifold.launch.commands.pretrain import prepare

    prepare(_resolve(recipe, changes), Console(), address)


@app.command()
def plan(
    recipe: Config,
    changes: Changes = None,
    nodes: Annotated[
        int, typer.Option(help="machines; with --per-node: other than the recipe's own workers")
    ] = 1,
    per_node: Annotated[int | None, typer.Option(help="devices of a machine")] = None,
    device: Annotated[
        Literal["cpu", "cuda"] | None,
        typer.Option(help="what it would run on; without it, as the recipe says"),
    ] = None,
    memory_gib: Annotated[
        float | None, typer.Option(help="of a device; without it that of this machine's")
    ] = None,
    tokens_per_second: Annotated[
        float | None, typer.Option(help="of one device; without it a few steps are measured here")
    ] = None,
    like: Annotated[Path | None, typer.Option(help="a run's folder: the rate that it had")] = None,
    write_mb_per_second: Annotated[
        float, typer.Option(help="of one device to the run folder, where its rate is given too")
    ] = 1000.0,
    price_per_hour: Annotated[float, typer.Option(help="of one device")] = 0.0,
    hours_per_failure: Annotated[float, typer.Option(help="of one device")] = 50_000.0,
) -> None:
    """Say what a recipe will need before anything starts: memory, seconds, checkpoints, price, what failures
    cost.
    """
    from trifold.launch.commands.plan import Machine, plan, rate_of
    from trifold.pretrain.engine.memory_estimate import device_memory

    config = _resolve(recipe, changes)
    kind = device or ("cuda" if config.cluster.gpus_per_worker else "cpu")
    ranks = nodes * per_node if per_node else nodes * max(1, config.cluster.workers)
    memory = memory_gib * 2**30 if memory_gib else device_memory(kind, ranks // nodes)
    where = Machine(
        ranks,
        kind,
        memory,
        tokens_per_second if like is None else rate_of(like),
        1e6 * write_mb_per_second,
        price_per_hour,
        hours_per_failure,
    )
    plan(config, where, Console())


@app.command("verify-resume")
def verify_resume(
    recipe: Config,
    changes: Changes = None,
    kills: Annotated[int, typer.Option(min=1, help="workers to kill, at moments drawn from the seed")] = 10,
    seed: Annotated[int, typer.Option(help="of the moments, workers and stages")] = 0,
) -> None:
    """Kill a short run of a recipe again and again, here, and compare it with the same run undisturbed: exit
    1 on any difference.
    """
    from trifold.launch.rehearse.verify_resume import verify_resume

    verify_resume(recipe, changes or [], kills, seed, Console())


@app.command()
def pretrain(
    recipe: Config,
    changes: Changes = None,
    workers: Annotated[
        int | None, typer.Option(help="ranks to train on; 0: in this process, without Ray")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="a Ray cluster to join; without it one is started on this machine")
    ] = None,
) -> None:
    """Train a recipe; on a run folder that exists, continue it."""
    from trifold.launch.commands.pretrain import pretrain

    pretrain(
        _resolve(
            recipe, [*(changes or []), *([f"cluster.workers={workers}"] if workers is not None else [])]
        ),
        Console(),
        address,
    )


@app.command()
def publish(
    run: Annotated[Path, typer.Argument(help="a run's folder")],
    out: Annotated[Path, typer.Option(help="the folder to make")],
    weights: Annotated[
        Literal["ema", "trained"] | None,
        typer.Option(help="averaged (the default where there are any) or trained"),
    ] = None,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="the LoRA adapters alone, in PEFT's format")
    ] = False,
) -> None:
    """Turn a run into a folder that stock Hugging Face classes load, verified before it appears."""
    from trifold.finetune.evaluation.model_selection import best_step
    from trifold.launch.recipe.reader import checkpoint_root_of_run
    from trifold.pretrain.monitor.events import describe
    from trifold.pretrain.publish.lora_adapter import publish_adapter
    from trifold.pretrain.publish.publish import publish

    def tell(event: str, **facts: object) -> None:
        typer.echo(describe(event, facts))

    root = checkpoint_root_of_run(run)
    best = best_step(root)
    if adapter:
        publish_adapter(run, out, on_event=tell, checkpoint=best, root=root)
        return typer.echo(f"{out} holds the adapters; PEFT reads them.")
    publish(run, out, on_event=tell, checkpoint=best, weights=weights, root=root)
    typer.echo(f"{out} is published and verified.")


@app.command()
def verify(folder: Published) -> None:
    """Check a published folder against the stock class: one page, exit 1 on any miss."""
    from trifold.pretrain.publish.verify import verify

    report = verify(folder)
    for check in report.checks:
        verdict = typer.style("passed", "green") if check.ok else typer.style("FAILED", "red", bold=True)
        typer.echo(f"{verdict}  {check.name}: {check.detail}")
    if not report.ok:
        raise UserError(f"{folder} is not what it should be: {report.failures}")


@app.command("import")
def import_(
    folder: Annotated[Path, typer.Argument(help="a folder with config.json and *.safetensors")],
) -> None:
    """Show what Trifold reads of a folder that stock classes load: architecture, tokenizer, what is dropped,
    what can be done with it.
    """
    from trifold.pretrain.publish.describe import describe

    for what, said in describe(folder):
        typer.echo(f"{what:>16}  {said}")


@app.command()
def finetune(
    recipe: Config,
    changes: Changes = None,
    workers: Annotated[
        int | None, typer.Option(help="ranks to train on; 0: in this process, without Ray")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="a Ray cluster to join; without it one is started on this machine")
    ] = None,
) -> None:
    """Teach a published model a task, and score it beside a trivial system; on a run folder that exists,
    continue it.
    """
    from trifold.launch.commands.finetune import finetune

    given = [*(changes or []), *([f"cluster.workers={workers}"] if workers is not None else [])]
    finetune(resolve(recipe, given, FinetuneRecipe), Console(), address)


@app.command()
def evaluate(
    folder: Published,
    task: Annotated[str, typer.Option(help="a fine-tuning recipe: its task's dev examples are answered")],
    changes: Changes = None,
    out: Annotated[Path | None, typer.Option(help="a file for the predictions, as JSON lines")] = None,
) -> None:
    """Score a published model on a task, beside a trivial system."""
    from trifold.launch.commands.finetune import evaluate

    evaluate(folder, resolve(task, changes or [], FinetuneRecipe), out, Console())


@app.command()
def generate(
    folder: Published,
    text: Annotated[
        str | None,
        typer.Argument(help="a text, or question<TAB>context; without it, lines of --file or stdin"),
    ] = None,
    file: Annotated[Path | None, typer.Option(help="a file with a text on each line")] = None,
    json: Annotated[
        bool, typer.Option("--json", help="JSON lines: entities with their spans, answers with their scores")
    ] = False,
    how: Annotated[
        list[str] | None,
        typer.Option(help="how text is written, such as beams=4, sample=true, top_p=0.9, max_new=200"),
    ] = None,
) -> None:
    """Let a published model answer: text, entities or a span, as its task has it."""
    from trifold.finetune.examples.pairs import existing, text_lines
    from trifold.launch.commands.finetune import generate

    if text is not None:
        texts = iter([text])
    elif file is not None:
        texts = (line for _, line in text_lines(existing(str(file))))
    else:
        texts = (line.decode(errors="surrogateescape").rstrip("\r\n") for line in sys.stdin.buffer)
    for said in generate(folder, texts, how or [], json):
        typer.echo(said)


@app.command()
def compare(
    configs: Annotated[
        list[str],
        typer.Argument(help="recipes, and changes to all of them, such as steps=300", metavar="CONFIG..."),
    ],
    out: Annotated[Path, typer.Option(help="the folder of the report")] = Path("runs/compare"),
    sentence: Annotated[
        str | None, typer.Option(help="a sentence to look at; without it one of the held-out ones")
    ] = None,
    word: Annotated[
        str | None, typer.Option(help="a word of --sentence, such as it: where every head looks from there")
    ] = None,
) -> None:
    """Train models of the same size on the same rows, and draw one report; what is finished is used as it
    is.
    """
    from trifold.launch.compare.compare import compare

    changes = [text for text in configs if "=" in text]
    recipes = [resolve_any(text, changes) for text in configs if "=" not in text]
    typer.echo(f"{compare(recipes, out, sentence, word, Console())} is the report.")


@app.command()
def world(folder: Annotated[Path, typer.Argument(help="the folder to write")] = Path("runs/demo")) -> None:
    """Write the small world that the demo and configs/compare/world-*.yaml learn from: text, and the examples
    of four tasks.
    """
    from trifold.launch.demo.world import write_world
    from trifold.launch.demo.world_tasks import write_tasks

    write_world(folder / "world")
    write_tasks(folder / "tasks")
    typer.echo(f"{folder}/world and {folder}/tasks are written.")


@app.command()
def demo() -> None:
    """The whole system on a generated small world: prepared, trained on two workers, one killed, resumed,
    published, verified, used.
    """
    from trifold.launch.demo.demo import demo

    demo(Console())


def main() -> None:
    """Run a command; a refusal, or the machine's, is printed without a traceback and exits 1."""
    for vendor in (
        "torchao",
        "torch.utils._pytree",
    ):  # transformers imports torchao, which names each kernel that this torch cannot load
        logging.getLogger(vendor).setLevel(logging.ERROR)
    os.environ["KINETO_LOG_LEVEL"] = (
        "6"  # torch's profiler, by which bench counts memory, announces its starts and stops
    )
    try:
        app()
    except UserError as refusal:
        said = str(refusal)
    except OSError as error:
        if error.errno not in MACHINE:
            raise
        where = f" ({error.filename})" if error.filename else ""
        said = (
            f"{error.strerror}{where}. What was saved is not lost: mend that, and run the same command again."
        )
    else:
        return
    typer.echo(f"{typer.style('trifold:', 'red', bold=True)} {said}", err=True)
    sys.exit(1)


def _resolve(recipe: str, changes: list[str] | None) -> PretrainRecipe:
    return resolve(recipe, changes or [])


if __name__ == "__main__":
    main()
