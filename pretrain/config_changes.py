"""What may change between the config that a run was trained with and the one that continues it.

The config in the newest checkpoint is the reference, whatever file names the run. `differences` lists each
changed key. A change is safe when a straight run of the new config would have taken the same steps so far,
up to rounding: `SAFE` is the table, and a key that is not in it is unsafe. Before the first step every
change is safe.
"""

import json
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from typing import Any, NamedTuple, TypeVar

from pydantic import ValidationError

from trifold.modeling.errors import UserError
from trifold.pretrain.config.flatten import flatten
from trifold.pretrain.config.pretraining import PretrainConfig
from trifold.pretrain.config.training import TrainingConfig
from trifold.pretrain.data.stages import ResolvedStage, locate_step, resolve_stages
from trifold.pretrain.engine.optimizer import lr_factor
from trifold.pretrain.initial_model import dropout_of

ConfigT = TypeVar("ConfigT", bound=TrainingConfig)


class Change(NamedTuple):
    key: str
    old: Any
    new: Any
    safe: bool


# A rule tells whether `new` would have taken the first `step` steps as `old` did. A fine-tuning config is no
# PretrainConfig; both have `model`.
Rule = Callable[[Any, Any, int], bool]


def _always(old: Any, new: Any, step: int) -> bool:
    return True


def _never(old: Any, new: Any, step: int) -> bool:
    return False


def _same_rows_so_far(old: Any, new: Any, step: int) -> bool:
    """Stages that are yet to come may change. Dropout is keyed by micro batches, and without it a micro
    batch's size changes only rounding.
    """
    dropout = max(dropout_of(old.model), dropout_of(new.model)) > 0
    if not (isinstance(old, PretrainConfig) and isinstance(new, PretrainConfig)):
        return bool(old.step_rows == new.step_rows) and not dropout
    old_stages, new_stages = resolve_stages(old), resolve_stages(new)
    return all(
        _rows_of_step(old_stages, i, dropout) == _rows_of_step(new_stages, i, dropout) for i in range(step)
    )


def _rows_of_step(stages: Sequence[ResolvedStage], step: int, dropout: bool) -> tuple[int, ...]:
    stage, row, micro = locate_step(stages, step)
    keys_of_dropout = (stage.micro_rows, micro) if dropout else ()
    return stage.row_length, stage.step_rows, row, *keys_of_dropout


def _same_rates_so_far(old: Any, new: Any, step: int) -> bool:
    """A longer run is the same run while no learning rate that was used would have been another (wsd before
    its decay, inverse_sqrt).
    """
    return all(
        lr_factor(old.schedule, i, old.steps) == lr_factor(new.schedule, i, new.steps) for i in range(step)
    )


def _no_dropout(old: Any, new: Any, step: int) -> bool:
    """Slices of a row draw their dropout separately."""
    return dropout_of(old.model) == dropout_of(new.model) == 0


SAFE: dict[str, Rule] = {
    "run": _always,  # the folder was moved
    # Moved files: the rows' fingerprint depends on their content, and training rejects other content.
    "data.sources.*.path": _always,
    "data.heldout.*.path": _always,
    "tokenizer.path": _always,
    "task.train.*": _always,
    "task.dev.*": _always,
    "model.from": _always,
    "data.cache": _always,
    # No weight depends on these.
    "data.prefetch": _always,
    "prefetch": _always,
    "patience": _always,
    "best": _always,
    "evaluate_every": _always,
    "evaluate_rows": _always,
    "evaluate_examples": _always,
    "generation.*": _always,
    "seeds": _always,  # each has a run folder of its own
    "cluster.*": _always,
    "scoring*": _always,
    "trackers*": _always,
    "ema": _always,  # an average beside the weights; where it is turned on, it starts from the weights
    # Rounding only: checkpoints have fp32 slices that any stage and precision reads.
    "engine.*": _always,
    "engine.sequence_parallel": _no_dropout,
    "checkpoints.*": _always,
    "checkpoints.storage": _never,  # the checkpoints so far are in the old one
    # The rule for the steps to come: past decisions are kept in the checkpoint.
    "spikes.*": _always,
    "nonfinite_limit": _always,
    "stages*": _same_rows_so_far,  # without stages the key is `stages`
    "data.row_length": _same_rows_so_far,
    "step_rows": _same_rows_so_far,
    "micro_rows": _same_rows_so_far,
    "steps": _same_rates_so_far,
    "schedule.*": _same_rates_so_far,
}


def differences(old: TrainingConfig, new: TrainingConfig, step: int) -> list[Change]:
    """Each dotted key whose value differs between two configs, after `step` steps of the old one."""
    before, after = flatten(old.model_dump(mode="json")), flatten(new.model_dump(mode="json"))
    changes = []
    for key in dict.fromkeys((*before, *after)):
        if before.get(key) != after.get(key):
            changes.append(Change(key, before.get(key), after.get(key), _is_safe(key, old, new, step)))
    return changes


def changes_since(saved: dict[str, Any], config: TrainingConfig, step: int, where: str) -> list[Change]:
    """The changes since the config that a checkpoint at `step` recorded; `where` names the run.

    Raises UserError where one of them makes it another run, where the run has taken more steps than
    `config` asks for, and where the recorded config cannot be read.
    """
    try:
        # as JSON: lists become tuples, and no other type changes
        old = type(config).model_validate_json(json.dumps(saved))
    except ValidationError as error:
        keys = ", ".join(".".join(map(str, problem["loc"])) for problem in error.errors()[:3])
        raise UserError(
            f"{where} was saved with a recipe that this version of Trifold, or this command, does not read"
            f" ({keys}). Continue it with the version and the command that began it."
        ) from None
    changes = differences(old, config, step)
    reject_other_run(changes, where)
    if config.steps < step:
        raise UserError(
            f"{where} has done {step} steps, and `steps` is {config.steps}: raise it to {step} or more, or"
            " name another folder with run=..."
        )
    return changes


def reject_other_run(changes: Sequence[Change], where: str) -> None:
    """Raises UserError that names each unsafe change with both values."""
    unsafe = [change for change in changes if not change.safe]
    if unsafe:
        lines = "\n".join(f"  {c.key}: {c.old!r} there, {c.new!r} here" for c in unsafe)
        raise UserError(
            f"{where} is a run of another recipe, and these keys change what was trained so far:\n{lines}\n"
            "Set them back to continue it, or name another folder with run=..., where model.from=... can"
            " start from the weights of a published one."
        )


def _is_safe(key: str, old: TrainingConfig, new: TrainingConfig, step: int) -> bool:
    rules = [rule for pattern, rule in SAFE.items() if fnmatch(key, pattern)]
    return step == 0 or (bool(rules) and all(rule(old, new, step) for rule in rules))
