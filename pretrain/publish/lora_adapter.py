"""LoRA adapters alone, in PEFT's format, over the published folder that training started from: a fraction of
the size of the merged model.

A run that trained adapters comes in; a folder with adapter_config.json and adapter_model.safetensors goes
out, which PEFT's `from_pretrained` reads. PEFT is no dependency: a test holds that the adapters compute in
the stock class what the merged weights compute, and those are verified when they are published.
"""

import json
from pathlib import Path

from trifold.modeling.config import Lora, ModelConfig
from trifold.modeling.errors import UserError
from trifold.modeling.huggingface.adapters import adapters
from trifold.pretrain.data.tokenizer.tokenizer import Tokenizer
from trifold.pretrain.monitor.events import OnEvent
from trifold.pretrain.publish import published_folder, weights
from trifold.pretrain.publish.publish import find_checkpoint
from trifold.pretrain.storage.atomic import replace_folder
from trifold.pretrain.storage.json_files import write_json
from trifold.pretrain.storage.storage_path import StoragePath


def publish_adapter(
    run: Path,
    out: Path,
    *,
    on_event: OnEvent,
    checkpoint: int | None = None,
    root: StoragePath | None = None,
) -> Path:
    """Write the adapters of a run's newest verified checkpoint, or that of step `checkpoint`, as the folder
    `out`. Returns `out`. `root`: as for `publish`.

    Raises UserError where there is no checkpoint, the run trained no adapters or started from no folder, or
    `out` exists.
    """
    if out.exists():
        raise UserError(f"{out} exists already and is not overwritten: give another folder, or move it away")
    source = find_checkpoint(run, on_event, checkpoint, root)
    recipe = source.state.config
    base = (recipe.get("model") or {}).get("from")
    if not recipe.get("lora") or base is None:
        raise UserError(
            f"{run} trained no adapters over a published folder (lora, model.from): publish its weights"
            " instead"
        )

    config = ModelConfig.model_validate_json(json.dumps(source.state.model))
    lora = Lora.model_validate_json(json.dumps(recipe["lora"]))
    state = {name: source.full(name) for name in source.names}
    special = published_folder.special_ids(Tokenizer.open(run / "tokenizer"))
    settings, tensors = adapters(config, state, lora, special, base)

    with replace_folder(out, overwrite=False) as folder:
        write_json(folder / "adapter_config.json", settings)
        weights.save_tensors(folder / "adapter_model.safetensors", tensors)
    return out
