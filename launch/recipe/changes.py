"""The recipe of a run folder that exists, compared with the one that is about to continue it."""

from pathlib import Path

from trifold.launch.recipe.reader import resolve, write
from trifold.launch.recipe.schema import AnyRecipe
from trifold.modeling.errors import UserError
from trifold.pretrain.checkpoint.checkpoint import intact_markers
from trifold.pretrain.checkpoint.lease import newest_generation
from trifold.pretrain.config_changes import Change, changes_since, differences, reject_other_run
from trifold.pretrain.monitor.run_folder import last_step
from trifold.pretrain.storage.storage import checkpoint_root


def reconcile_run_folder(config: AnyRecipe) -> list[Change]:
    """Write the recipe as the run folder's config.yaml, and return what has changed.

    The reference is the config in the newest checkpoint, whatever config.yaml says by now; without a
    checkpoint it is config.yaml. Raises UserError that names each key whose change would make it another run,
    and where fewer steps are asked for than the run has done.
    """
    file = Path(config.run) / "config.yaml"
    root = checkpoint_root(file.parent, config.checkpoints.storage)
    changes: list[Change] = []
    newest = next(intact_markers(root), None)
    if newest is not None:
        changes = changes_since(newest.state.config, config, newest.state.step, str(root))
    elif (file.parent / "tokenizer").exists():  # made first; before it, nothing depends on the recipe
        steps = last_step(file.parent)
        if steps and config.checkpoints.storage is not None and newest_generation(root) == 0:
            raise UserError(
                f"{config.run} has trained {steps} steps, and {root} holds nothing of it: checkpoints.storage"
                " knows a run by the name of its folder. Give the folder back its name."
            )
        changes = differences(resolve(file, kind=type(config)), config, steps)  # type: ignore[type-var]
        reject_other_run(changes, str(root))
    write(config, file)
    return changes
