"""The commands that talk to a cluster: `trifold submit`, status, logs, stop, resume, doctor. Each imports Ray
only when it runs.
"""

from pathlib import Path
from typing import Annotated

import typer

from trifold.launch.recipe.reader import resolve_any
from trifold.launch.terminal import Terminal

app = typer.Typer()

Recipe = Annotated[str, typer.Argument(help="a recipe: a YAML file", metavar="CONFIG")]
Changes = Annotated[
    list[str] | None,
    typer.Argument(help="overrides, such as optimizer.lr=1e-3", metavar="[KEY=VALUE]..."),
]
RunName = Annotated[str, typer.Argument(help="a run's name: the name of its folder", metavar="RUN")]
AnyRun = Annotated[
    str | None,
    typer.Argument(help="a run's name: the name of its folder [default: all runs]", metavar="[RUN]"),
]
Address = Annotated[str, typer.Option(help="the cluster's job server", envvar="RAY_API_SERVER_ADDRESS")]
JOBS = "http://127.0.0.1:8265"
Code = Annotated[
    bool, typer.Option("--code", help="ship this source tree instead of using the Trifold installed there")
]


@app.command()
def submit(
    recipe: Recipe,
    changes: Changes = None,
    address: Address = JOBS,
    code: Code = False,
) -> None:
    """Train a recipe as a job on a Ray cluster and follow its log. Ctrl-C detaches and leaves it running."""
    from trifold.launch.jobs.jobs import Jobs

    jobs = Jobs(address)
    jobs.follow(jobs.submit(resolve_any(recipe, changes or []), code), Terminal())


@app.command()
def status(run: AnyRun = None, address: Address = JOBS) -> None:
    """Show the status of all runs on a cluster, or of one."""
    from trifold.launch.jobs.jobs import Jobs

    Jobs(address).status(run, Terminal())


@app.command()
def logs(
    run: RunName,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="follow it until the run ends or Ctrl-C")
    ] = False,
    address: Address = JOBS,
) -> None:
    """Print a run's log."""
    from trifold.launch.jobs.jobs import Jobs

    jobs = Jobs(address)
    (jobs.follow if follow else jobs.logs)(run, Terminal())


@app.command()
def stop(
    run: RunName,
    wait: Annotated[
        float, typer.Option(help="seconds to wait for the save before killing the job", min=0)
    ] = 600,
    address: Address = JOBS,
) -> None:
    """Checkpoint a run and stop it."""
    from trifold.launch.jobs.jobs import Jobs

    Jobs(address).stop(run, wait, Terminal())


@app.command()
def resume(
    run: RunName,
    address: Address = JOBS,
    code: Code = False,
) -> None:
    """Resume a run from its newest verified checkpoint and follow its log."""
    from trifold.launch.jobs.jobs import Jobs

    jobs = Jobs(address)
    jobs.follow(jobs.resume(run, code), Terminal())


@app.command()
def doctor(
    storage: Annotated[Path, typer.Argument(help="the folder of the runs")] = Path("runs"),
    address: Annotated[
        str | None,
        typer.Option(
            help="HOST:PORT of the cluster that this machine belongs to, or its job server"
            " [default: this machine alone]"
        ),
    ] = None,
    code: Code = False,
) -> None:
    """Check a cluster: versions, GPUs, network, a timed all-reduce, shared storage, clocks. Exits 1 if
    something must be fixed.
    """
    if address is not None and "://" in address and not address.startswith("ray://"):
        from trifold.launch.jobs.jobs import Jobs

        return Jobs(address).doctor(storage, code, Terminal())
    from trifold.launch.jobs.doctor import doctor

    doctor(address, storage, Terminal())
