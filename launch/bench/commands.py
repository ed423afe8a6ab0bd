"""The commands of `trifold bench`: each measures this machine, shows one table, and with --out writes
OUT.json and OUT.png.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from trifold.launch.terminal import Terminal

if TYPE_CHECKING:  # torch takes a second, and `trifold --help` should not
    from trifold.pretrain.distributed import RankInfo

app = typer.Typer(no_args_is_help=True, help="Benchmark this machine against Hugging Face baselines.")

Config = Annotated[str, typer.Argument(help="a recipe: a YAML file", metavar="CONFIG")]
Changes = Annotated[
    list[str] | None, typer.Argument(help="overrides, such as micro_rows=16", metavar="[KEY=VALUE]...")
]
Device = Annotated[Literal["cpu", "cuda"] | None, typer.Option(help="device [default: cuda if there is one]")]
Threads = Annotated[int, typer.Option(help="CPU threads")]
Out = Annotated[Path | None, typer.Option(help="write OUT.json and OUT.png")]


@app.command()
def train(
    recipe: Config,
    changes: Changes = None,
    peers: Annotated[
        bool, typer.Option("--peers", help="also Hugging Face classes of the same shape, eager and compiled")
    ] = False,
    eager: Annotated[
        bool, typer.Option("--eager", help="run the peers eager only: compiling takes a minute each")
    ] = False,
    documents: Annotated[int, typer.Option(help="documents per row; 0: each row is one document")] = 0,
    steps: Annotated[int, typer.Option(help="timed steps; the median is reported")] = 20,
    warmup: Annotated[int, typer.Option(help="untimed steps before them")] = 3,
    trace: Annotated[
        Path | None,
        typer.Option("--profile", help="write a trace of ours to this file and show where the time is spent"),
    ] = None,
    device: Device = None,
    threads: Threads = 1,
    out: Out = None,
) -> None:
    """Measure the throughput of a recipe on rows of its shape: tokens/s, MFU, peak memory."""
    from trifold.launch.bench.train import bench
    from trifold.launch.recipe.reader import resolve

    bench(
        resolve(recipe, changes or []),
        _rank_info(device, threads),
        Terminal(),
        documents=documents,
        peers=peers,
        eager=eager,
        steps=steps,
        warmup=warmup,
        out=out,
        trace=trace,
    )


@app.command()
def data(
    recipe: Config,
    changes: Changes = None,
    megabytes: Annotated[int, typer.Option(help="megabytes of text to tokenize")] = 10,
    documents: Annotated[int, typer.Option(help="documents per row")] = 3,
    out: Out = None,
) -> None:
    """Measure tokens per second of one core: tokenizing next to SentencePiece, and the rows of each
    objective.
    """
    from trifold.launch.bench.data import bench
    from trifold.launch.recipe.reader import resolve

    bench(
        resolve(recipe, changes or []), Terminal(), megabytes=megabytes, documents_per_row=documents, out=out
    )


@app.command()
def save(
    recipe: Config,
    changes: Changes = None,
    folder: Annotated[Path, typer.Option(help="a folder on the disk to write to")] = Path("."),
    device: Device = None,
    threads: Threads = 1,
    out: Out = None,
) -> None:
    """Measure the cost of a checkpoint: how long training waits, the background writes, a resume reads."""
    from trifold.launch.bench.save import bench
    from trifold.launch.recipe.reader import resolve

    bench(resolve(recipe, changes or []), _rank_info(device, threads), Terminal(), folder=folder, out=out)


@app.command()
def generate(
    recipe: Config,
    changes: Changes = None,
    new: Annotated[int, typer.Option(help="tokens to generate")] = 64,
    rounds: Annotated[int, typer.Option(help="rounds; the median is reported")] = 5,
    device: Device = None,
    threads: Threads = 1,
    out: Out = None,
) -> None:
    """Measure generation speed next to the Hugging Face class with the same weights: batch 1 and 32, greedy
    and beam search.
    """
    from trifold.launch.bench.generate import bench
    from trifold.launch.recipe.reader import resolve

    bench(
        resolve(recipe, changes or []),
        _rank_info(device, threads),
        Terminal(),
        new=new,
        rounds=rounds,
        out=out,
    )


@app.command()
def gpu(
    only: Annotated[
        list[str] | None, typer.Option(help="of the shapes, by their beginnings; several times")
    ] = None,
    seconds: Annotated[
        float, typer.Option(help="after which the table is printed, whatever is done by then")
    ] = 520,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="rehearse the same code on small shapes on the CPU")
    ] = False,
    steps: Annotated[int, typer.Option(help="timed steps; the median is reported")] = 20,
    out: Out = None,
) -> None:
    """Measure the table of goals on one GPU: six shapes, ours next to Hugging Face classes, each contender in
    a process.
    """
    from trifold.launch.bench.gpu import bench

    bench(Terminal(), only=only or [""], seconds=seconds, tiny=tiny, steps=steps, out=out)


@app.command(hidden=True)
def shape(name: str, contender: int, out: Path, steps: int, turn: Path, tiny: bool = False) -> None:
    """One contender of one shape of `gpu`, in this process; its row is appended to OUT."""
    from trifold.launch.bench.gpu import measure

    measure(
        name,
        contender,
        out,
        steps=steps,
        tiny=tiny,
        rank_info=_rank_info("cpu" if tiny else "cuda", 1),
        turn=turn,
    )


def _rank_info(device: Literal["cpu", "cuda"] | None, threads: int) -> "RankInfo":
    import torch

    from trifold.pretrain.distributed import RankInfo

    return RankInfo.single(device or ("cuda" if torch.cuda.is_available() else "cpu"), threads)
