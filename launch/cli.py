"""The command line: `trifold COMMAND ...`.

A user's mistake is printed as one message, with exit code 1; a defect keeps its traceback. Each command
imports what it needs after its recipe is read, so that `trifold --help` and a mistake are answered at once.
"""

import codecs
import errno
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import typer

from trifold.launch.bench.commands import app as bench
from trifold.launch.commands.jobs_cli import Changes, Recipe
from trifold.launch.commands.jobs_cli import app as jobs
from trifold.launch.recipe.reader import resolve, resolve_any
from trifold.launch.recipe.schema import FinetuneRecipe, PretrainRecipe
from trifold.launch.terminal import Terminal, use_utf8, visible
from trifold.modeling.errors import UserError

# a full disk, a folder that may not be written or is a file: the machine's state, not a defect
MACHINE_ERRORS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
)

Folder = Annotated[Path, typer.Argument(help="a published folder")]
Workers = Annotated[
    int | None, typer.Option(help="number of workers (ranks); 0 trains in this process, without Ray")
]
Cluster = Annotated[
    str | None, typer.Option(help="HOST:PORT of a Ray cluster to join [default: start one on this machine]")
]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Pretrain and fine-tune encoder, decoder and encoder-decoder transformers, with exact resume.",
)

app.add_typer(bench, name="bench")
app.add_typer(jobs)


@app.command()
def tokenizer(recipe: Recipe, changes: Changes = None) -> None:
    """Train the recipe's SentencePiece tokenizer."""
    config = _resolve(recipe, changes)
    from trifold.launch.commands.pretrain import make_tokenizer

    console = Terminal()
    trained = make_tokenizer(config, console)
    console.print_line(f"{trained.vocab_size} pieces, fingerprint {trained.fingerprint}")


@app.command()
def prepare(
    recipe: Recipe,
    changes: Changes = None,
    address: Annotated[
        str | None,
        typer.Option(help="HOST:PORT of a Ray cluster whose nodes tokenize [default: this machine]"),
    ] = None,
) -> None:
    """Tokenize the corpus into shards. `pretrain` does this too where they are missing."""
    config = _resolve(recipe, changes)
    from trifold.launch.commands.pretrain import prepare

    prepare(config, Terminal(), address)


@app.command()
def plan(
    recipe: Recipe,
    changes: Changes = None,
    nodes: Annotated[int, typer.Option(help="number of nodes", min=1)] = 1,
    per_node: Annotated[
        int | None, typer.Option(help="devices per node; overrides cluster.workers", min=1)
    ] = None,
    device: Annotated[
        Literal["cpu", "cuda"] | None,
        typer.Option(help="device of each rank [default: cuda if the recipe sets cluster.gpus_per_worker]"),
    ] = None,
    memory_gib: Annotated[
        float | None, typer.Option(help="memory per device in GiB [default: this machine's]")
    ] = None,
    tokens_per_second: Annotated[
        float | None, typer.Option(help="throughput per device [default: measured here in a few steps]")
    ] = None,
    like: Annotated[
        Path | None, typer.Option(help="run folder of an earlier run to take the throughput from")
    ] = None,
    write_mb_per_second: Annotated[
        float, typer.Option(help="write rate to the run folder per device, where the throughput is given")
    ] = 1000.0,
    price_per_hour: Annotated[float, typer.Option(help="price per device and hour")] = 0.0,
    hours_per_failure: Annotated[
        float, typer.Option(help="mean time between failures of a device")
    ] = 50_000.0,
) -> None:
    """Estimate memory, step time, checkpoint size, price and failure overhead of a recipe."""
    config = _resolve(recipe, changes)
    from trifold.launch.commands.plan import Machine, plan, rate_of
    from trifold.pretrain.engine.memory_estimate import device_memory

    kind = device or ("cuda" if config.cluster.gpus_per_worker else "cpu")
    ranks = nodes * (per_node or max(1, config.cluster.workers))
    machine = Machine(
        ranks=ranks,
        device=kind,
        memory=memory_gib * 2**30 if memory_gib else device_memory(kind, ranks // nodes),
        tokens_per_second=tokens_per_second if like is None else rate_of(like),
        write_bytes_per_second=1e6 * write_mb_per_second,
        price_per_hour=price_per_hour,
        hours_per_failure=hours_per_failure,
    )
    plan(config, machine, Terminal())


@app.command("verify-resume")
def verify_resume(
    recipe: Recipe,
    changes: Changes = None,
    kills: Annotated[int, typer.Option(min=1, help="number of kill -9, at random moments")] = 10,
    seed: Annotated[int, typer.Option(help="seed of the moments, ranks and ZeRO stages")] = 0,
) -> None:
    """Kill a short run of a recipe repeatedly on this machine and compare it with the same run undisturbed.
    Exits 1 on any difference.
    """
    from trifold.launch.rehearse.verify_resume import verify_resume

    verify_resume(recipe, changes or [], kills, seed, Terminal())


@app.command()
def pretrain(
    recipe: Recipe, changes: Changes = None, workers: Workers = None, address: Cluster = None
) -> None:
    """Pretrain a model; resumes if the run folder exists."""
    config = _resolve(recipe, _with_workers(changes, workers))
    from trifold.launch.commands.pretrain import pretrain

    pretrain(config, Terminal(), address)


@app.command()
def publish(
    run: Annotated[Path, typer.Argument(help="a run folder")],
    out: Annotated[Path, typer.Option(help="the folder to create")],
    weights: Annotated[
        Literal["ema", "trained"] | None,
        typer.Option(help="averaged or trained weights [default: averaged if the run has them]"),
    ] = None,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="only the LoRA adapters, in PEFT's format")
    ] = False,
) -> None:
    """Export a run as a folder that Hugging Face classes load, verified before it appears."""
    from trifold.finetune.evaluation.model_selection import best_step
    from trifold.finetune.evaluation.seeds import run_to_publish
    from trifold.launch.recipe.reader import checkpoint_root_of_run
    from trifold.pretrain.monitor.events import describe
    from trifold.pretrain.publish.lora_adapter import publish_adapter
    from trifold.pretrain.publish.publish import publish

    def report(event: str, **fields: object) -> None:
        if (text := describe(event, fields)) is not None:
            _echo(text)

    run = run_to_publish(run)
    root = checkpoint_root_of_run(run)
    best = best_step(root)
    if adapter:
        publish_adapter(run, out, on_event=report, checkpoint=best, root=root)
        return _echo(f"{out} holds the adapters; PEFT reads them.")
    publish(run, out, on_event=report, checkpoint=best, weights=weights, root=root)
    _echo(f"{out} is published and verified.")


@app.command()
def verify(folder: Folder) -> None:
    """Compare a published folder with the Hugging Face class. Exits 1 if a check fails."""
    from trifold.pretrain.publish.verify import verify

    report = verify(folder)
    for check in report.checks:
        verdict = typer.style("passed", "green") if check.ok else typer.style("FAILED", "red", bold=True)
        typer.echo(f"{verdict}  {visible(f'{check.name}: {check.detail}')}")
    if not report.ok:
        raise UserError(f"{folder} failed verification: {report.failures}")


@app.command("import")
def import_(
    folder: Annotated[Path, typer.Argument(help="a folder with config.json and *.safetensors")],
) -> None:
    """Show how Trifold reads a Hugging Face folder: architecture, tokenizer, what is dropped, and what can be
    done with it.
    """
    from trifold.pretrain.publish.describe import describe

    for label, description in describe(folder):
        _echo(f"{label:>16}  {description}")


@app.command()
def finetune(
    recipe: Recipe, changes: Changes = None, workers: Workers = None, address: Cluster = None
) -> None:
    """Fine-tune a published model and report scores next to a trivial baseline; resumes if the run folder
    exists.
    """
    config = resolve(recipe, _with_workers(changes, workers), FinetuneRecipe)
    from trifold.launch.commands.finetune import finetune

    finetune(config, Terminal(), address)


@app.command()
def evaluate(
    folder: Folder,
    task: Annotated[
        str, typer.Option(help="a fine-tuning recipe: a YAML file, whose dev examples are scored")
    ],
    changes: Changes = None,
    out: Annotated[Path | None, typer.Option(help="a file for the predictions, as JSON lines")] = None,
) -> None:
    """Score a published model on a task's dev examples, next to a trivial baseline."""
    config = resolve(task, changes or [], FinetuneRecipe)
    from trifold.launch.commands.finetune import evaluate

    evaluate(folder, config, out, Terminal())


@app.command()
def generate(
    folder: Folder,
    text: Annotated[
        str | None,
        typer.Argument(help="a text, or question<TAB>context [default: the lines of --file or of stdin]"),
    ] = None,
    file: Annotated[Path | None, typer.Option(help="a file with one text per line")] = None,
    json: Annotated[
        bool, typer.Option("--json", help="JSON lines: entities with their spans, answers with their scores")
    ] = False,
    how: Annotated[
        list[str] | None,
        typer.Option(help="generation setting: beams=4, sample=true, top_p=0.9, max_new=200, ..."),
    ] = None,
) -> None:
    """Run a published model: generates text, entities or answer spans, depending on its task."""
    from trifold.finetune.examples.records import existing, text_lines
    from trifold.launch.commands.finetune import generate

    if text is not None:
        texts = iter([_argument_as_utf8(text)])
    elif file is not None:
        texts = (line for _, line in text_lines(existing(str(file))))
    else:
        texts = _lines_of_stdin()
    for output in generate(folder, texts, how or [], json):
        typer.echo(output)


@app.command()
def compare(
    recipes: Annotated[
        list[str],
        typer.Argument(help="recipes, and overrides for all of them, such as steps=300", metavar="CONFIG..."),
    ],
    out: Annotated[Path, typer.Option(help="the folder for the report")] = Path("runs/compare"),
    sentence: Annotated[
        str | None, typer.Option(help="the sentence to show [default: one of the held-out text]")
    ] = None,
    word: Annotated[
        str | None, typer.Option(help="a word of --sentence: show what every head attends to from it")
    ] = None,
) -> None:
    """Train models of the same size on the same rows and draw one report. Finished runs are reused."""
    changes = [text for text in recipes if "=" in text]
    configs = [resolve_any(text, changes) for text in recipes if "=" not in text]
    from trifold.launch.compare.compare import compare

    _echo(f"The report: {compare(configs, out, sentence, word, Terminal())}")


@app.command()
def world(folder: Annotated[Path, typer.Argument(help="the folder to write")] = Path("runs/demo")) -> None:
    """Generate the toy corpus of the demo and of configs/compare/world-*.yaml, with four tasks."""
    from trifold.launch.demo.world import write_world
    from trifold.launch.demo.world_tasks import write_tasks

    write_world(folder / "world")
    write_tasks(folder / "tasks")
    _echo(f"{folder}/world and {folder}/tasks are written.")


@app.command()
def demo() -> None:
    """Run the whole pipeline on a toy corpus: pretrain three models, kill and resume a worker, publish and
    verify, and fine-tune on question answering, NER, summarization and translation.
    """
    from trifold.launch.demo.demo import demo

    demo(Terminal())


def main(arguments: list[str] | None = None) -> None:
    """Run a command. A UserError, or an error of the machine, is printed without a traceback and exits 1."""
    use_utf8()
    # transformers imports torchao, which warns about each kernel that this torch cannot load
    for logger in ("torchao", "torch.utils._pytree"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    # torch's profiler, by which bench counts memory, announces its starts and stops
    os.environ["KINETO_LOG_LEVEL"] = "6"
    try:
        return app(arguments)
    except UserError as error:
        message = str(error)
    except OSError as error:
        if error.errno not in MACHINE_ERRORS:
            raise
        file = f" ({error.filename})" if error.filename else ""
        message = f"{error.strerror}{file}. No saved checkpoint is lost: fix this and rerun the same command."
    typer.echo(f"{typer.style('trifold:', 'red', bold=True)} {visible(message)}", err=True)
    sys.exit(1)


def _resolve(recipe: str, changes: list[str] | None) -> PretrainRecipe:
    return resolve(recipe, changes or [])


def _with_workers(changes: list[str] | None, workers: int | None) -> list[str]:
    override = [f"cluster.workers={workers}"] if workers is not None else []
    return [*(changes or []), *override]


def _echo(message: str) -> None:
    typer.echo(visible(message))


def _argument_as_utf8(text: str) -> str:
    """An argument as UTF-8, also in a locale such as C, where Python decodes it as ASCII."""
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeError:
        return text


def _lines_of_stdin() -> Iterator[str]:
    for number, line in enumerate(sys.stdin.buffer):
        if number == 0:
            line = line.removeprefix(codecs.BOM_UTF8)
        yield line.decode(errors="surrogateescape").rstrip("\r\n")


if __name__ == "__main__":
    main()
