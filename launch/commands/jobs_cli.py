"""The commands that speak to a cluster: `trifold submit`, status, logs, stop, resume, doctor. Each imports
Ray only when it runs.
"""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from trifold.launch.recipe.reader import resolve_any

app = typer.Typer()

Config = Annotated[str, typer.Argument(help="a recipe: a YAML file", metavar="CONFIG")]
Changes = Annotated[
    list[str] | None,
    typer.Argument(help="changes to it, such as optimizer.lr=1e-3", metavar="[KEY=VALUE]..."),
]
RunName = Annotated[str, typer.Argument(help="a run's name: that of its folder", metavar="RUN")]
AnyRun = Annotated[
    str | None, typer.Argument(help="a run's name: that of its folder; without it all runs", metavar="[RUN]")
]
Address = Annotated[str, typer.Option(help="the cluster's job server", envvar="RAY_API_SERVER_ADDRESS")]
JOBS = "http://127.0.0.1:8265"
Code = Annotated[
    bool, typer.Option("--code", help="ship this working tree, instead of using the Trifold installed there")
]


@app.command()
def submit(
    recipe: Config,
    changes: Changes = None,
    address: Address = JOBS,
    code: Code = False,
) -> None:
    """Train a recipe as a job of a Ray cluster, and follow it; Ctrl-C leaves it running."""
    from trifold.launch.jobs.jobs import Jobs

    jobs = Jobs(address)
    jobs.follow(jobs.submit(resolve_any(recipe, changes or []), code), Console())


@app.command()
def status(run: AnyRun = None, address: Address = JOBS) -> None:
    """How the runs of a cluster stand, or one of them."""
    from trifold.launch.jobs.jobs import Jobs

    Jobs(address).status(run, Console())


@app.command()
def logs(
    run: RunName,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="stay with it until it ends or Ctrl-C")
    ] = False,
    address: Address = JOBS,
) -> None:
    """What a run on a cluster has said."""
    from trifold.launch.jobs.jobs import Jobs

    jobs = Jobs(address)
    (jobs.follow if follow else jobs.logs)(run, Console())


@app.command()
def stop(
    run: RunName,
    wait: Annotated[float, typer.Option(help="seconds until its job is ended without a save")] = 600,
    address: Address = JOBS,
) -> None:
    """Let a run on a cluster save, then end it."""
    from trifold.launch.jobs.jobs import Jobs

    Jobs(address).stop(run, wait, Console())


@app.command()
def resume(
    run: RunName,
    address: Address = JOBS,
    code: Code = False,
) -> None:
    """Continue a run on a cluster from its newest verified checkpoint, and follow it."""
    from trifold.launch.jobs.jobs import Jobs

    jobs = Jobs(address)
    jobs.follow(jobs.resume(run, code), Console())


@app.command()
def doctor(
    storage: Annotated[Path, typer.Argument(help="the folder where runs go")] = Path("runs"),
    address: Annotated[
        str | None,
        typer.Option(help="HOST:PORT of a cluster this machine is in, or its job server; none: this machine"),
    ] = None,
    code: Code = False,
) -> None:
    """Examine a cluster: versions, GPUs, network, a timed all-reduce, shared storage, clocks; exit 1 where
    something must be mended.
    """
    if address is not None and "://" in address and not address.startswith("ray://"):
        from trifold.launch.jobs.jobs import Jobs

        return Jobs(address).doctor(storage, code, Console())
    from trifold.launch.jobs.doctor import doctor

    doctor(address, storage, Console())
