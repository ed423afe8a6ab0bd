"""Low-rank adapters alone, in PEFT's format, over the published folder that training started from: a fraction
of a merged folder's size.

In: a run that trained adapters. Out: a folder with adapter_config.json and adapter_model.safetensors, which
PEFT's `from_pretrained` reads. PEFT is no dependency: that the adapters mean in the stock class what the
merged weights mean is tested, and verified on publishing those.
"""

import json
import os
import shutil
from pathlib import Path
from uuid import uuid4

from safetensors.torch import save_file

from trifold.modeling.config import Lora, ModelConfig
from trifold.modeling.errors import UserError
from trifold.modeling.huggingface.adapters import adapters
from trifold.pretrain.checkpoint.checkpoint import OnEvent
from trifold.pretrain.data.tokenizer.tokenizer import Tokenizer
from trifold.pretrain.publish import published_folder
from trifold.pretrain.publish.publish import initial_model_of


def publish_adapter(run: Path, out: Path, *, on_event: OnEvent, checkpoint: int | None = None) -> Path:
    """Write the adapters of a run's newest verified checkpoint, or that of step `checkpoint`, as the folder
    `out`. Returns `out`.

    Raises UserError where there is no checkpoint, the run trained no adapters, it started from no folder, or
    `out` exists.
    """
    if out.exists():
        raise UserError(f"{out} exists already and is not overwritten: give another folder, or move it away")
    state = (source := initial_model_of(run, on_event, checkpoint)).state
    base = (state.config.get("model") or {}).get("from")
    if not state.config.get("lora") or base is None:
        raise UserError(
            f"{run} trained no adapters over a published folder (lora, model.from): publish its weights"
            " instead"
        )
    lora = Lora.model_validate_json(json.dumps(state.config["lora"]))
    config = ModelConfig.model_validate_json(json.dumps(state.extra["model"]))
    weights = {name: source.full(name) for name in source.names}
    settings, tensors = adapters(
        config, weights, lora, published_folder.special_ids(Tokenizer.open(run / "tokenizer")), base
    )
    partial = out.with_name(f".{out.name}.{uuid4().hex[:8]}")
    try:
        partial.mkdir(parents=True)
        published_folder.write_json(partial / "adapter_config.json", settings)
        save_file(tensors, partial / "adapter_model.safetensors", metadata={"format": "pt"})
        os.rename(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out
