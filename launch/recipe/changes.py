"""What may change when `pretrain` runs on a run folder that exists: a literal table, and the folder's own
recipe compared with it.

In: the old and the new recipe as mappings, and how many steps were taken. Out: each changed key with a
verdict. A change is safe when a straight run of the new recipe would have taken the same steps so far, up to
rounding; anything that is not in the table is unsafe. Before the first step all is safe.
"""

from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from trifold.launch.recipe.errors import validate
from trifold.launch.recipe.reader import flatten, resolve, write
from trifold.launch.recipe.schema import AnyRecipe, PretrainRecipe
from trifold.modeling.errors import UserError
from trifold.pretrain.checkpoint.checkpoint import read_marker
from trifold.pretrain.checkpoint.lease import newest_generation, valid_folders
from trifold.pretrain.data.stages import ResolvedStage, locate_step, resolve_stages
from trifold.pretrain.engine.optimizer import lr_factor
from trifold.pretrain.monitor.run_folder import last_step
from trifold.pretrain.storage.storage import checkpoint_root


class Change(NamedTuple):
    key: str
    old: Any
    new: Any
    safe: bool


def _always(old: AnyRecipe, new: AnyRecipe, step: int) -> bool:
    return True


def _never(old: AnyRecipe, new: AnyRecipe, step: int) -> bool:
    return False


def _same_rows_so_far(old: AnyRecipe, new: AnyRecipe, step: int) -> bool:
    """Stages that are yet to come may change. Dropout is keyed by micros, and without it a micro's size is
    only a matter of rounding.
    """
    if not (isinstance(old, PretrainRecipe) and isinstance(new, PretrainRecipe)):
        return old.step_rows == new.step_rows and old.model.dropout == new.model.dropout == 0
    before, after = resolve_stages(old), resolve_stages(new)
    keyed = max(old.model.dropout, new.model.dropout) > 0

    def read(plan: list[ResolvedStage], i: int) -> tuple[int, ...]:
        part, row, micro = locate_step(plan, i)
        return part.row_length, part.step_rows, row, *((part.micro_rows, micro) if keyed else ())

    return all(read(before, i) == read(after, i) for i in range(step))


def _same_rates_so_far(old: AnyRecipe, new: AnyRecipe, step: int) -> bool:
    """A longer run is the same run while no learning rate that was used would have been another (wsd before
    its decay, inverse_sqrt).
    """
    return all(
        lr_factor(old.schedule, i, old.steps) == lr_factor(new.schedule, i, new.steps) for i in range(step)
    )


def _same_draws(old: AnyRecipe, new: AnyRecipe, step: int) -> bool:
    """Slices of a row draw their dropout apart."""
    return old.model.dropout == new.model.dropout == 0


SAFE: dict[str, Callable[[AnyRecipe, AnyRecipe, int], bool]] = {
    "run": _always,  # the folder was moved
    # a corpus was moved: the rows' fingerprint knows its content, and training refuses another
    "data.sources.*.path": _always,
    "data.heldout.*.path": _always,
    "tokenizer.path": _always,  # the same
    "data.cache": _always,
    "data.prefetch": _always,
    **dict.fromkeys(
        ("task.train.*", "task.dev.*", "model.from"), _always
    ),  # moved: fingerprints know what is in them
    **dict.fromkeys(
        ("prefetch", "patience", "best", "evaluate_examples", "generation.*"), _always
    ),  # no weight changes by these
    "engine.*": _always,  # rounding only; checkpoints hold fp32 slices that any stage and precision reads
    "engine.sequence_parallel": _same_draws,
    "checkpoints.*": _always,
    "checkpoints.storage": _never,  # the checkpoints so far are there
    "evaluate_every": _always,
    "evaluate_rows": _always,
    "spikes.*": _always,  # the rule for steps to come: what was decided so far is kept in the checkpoint
    "nonfinite_limit": _always,
    "cluster.*": _always,
    "scoring*": _always,  # beside training
    "trackers*": _always,
    "ema": _always,  # an average beside the weights; turned on, it starts from where they are
    "stages*": _same_rows_so_far,  # none at all is the key `stages`
    "data.row_length": _same_rows_so_far,
    "step_rows": _same_rows_so_far,
    "micro_rows": _same_rows_so_far,
    "steps": _same_rates_so_far,
    "schedule.*": _same_rates_so_far,
}


def differences(old: AnyRecipe, new: AnyRecipe, step: int) -> list[Change]:
    """Every dotted key whose value differs between two recipes, after `step` steps of the old one."""
    before, after = flatten(old.model_dump(mode="json")), flatten(new.model_dump(mode="json"))
    changed = [key for key in dict.fromkeys((*before, *after)) if before.get(key) != after.get(key)]
    return [Change(key, before.get(key), after.get(key), _safe(key, old, new, step)) for key in changed]


def reconcile_run_folder(config: AnyRecipe) -> list[Change]:
    """Write the recipe as the run folder's config.yaml; of a folder that exists, return what changed, or
    refuse each unsafe key.
    """
    file = Path(config.run) / "config.yaml"
    changes: list[Change] = []
    home = checkpoint_root(file.parent, config.checkpoints.storage)
    made = (file.parent / "tokenizer").exists()  # first; before it, nothing here depends on the recipe
    steps = last_step(file.parent)
    if not (made and steps) and (
        found := valid_folders(home)
    ):  # a folder that is new here, of a run that was trained elsewhere
        state = read_marker(found[-1])["state"]
        changes = differences(
            validate(type(config), state["config"], {}, str(found[-1])), config, state["step"]
        )
    elif made:
        changes = differences(resolve(file, kind=type(config)), config, steps)  # type: ignore[type-var]
        if steps and config.checkpoints.storage is not None and newest_generation(home) == 0:
            raise UserError(
                f"{config.run} has trained {steps} steps, and {home} holds nothing of it:"
                " checkpoints.storage knows a run by the"
                " name of its folder. Give the folder back its name."
            )
    if unsafe := [change for change in changes if not change.safe]:
        said = "\n".join(f"  {c.key}: {c.old!r} there, {c.new!r} here" for c in unsafe)
        raise UserError(
            f"{home} is a run of another recipe, and these keys change what was trained so far:\n{said}\n"
            "Give them back their values to continue it, or name another folder with run=...,"
            " which model.from=... begins with the weights of a published one."
        )
    write(config, file)
    return changes


def _safe(key: str, old: AnyRecipe, new: AnyRecipe, step: int) -> bool:
    rules = [rule for pattern, rule in SAFE.items() if fnmatch(key, pattern)]
    return step == 0 or (bool(rules) and all(rule(old, new, step) for rule in rules))
