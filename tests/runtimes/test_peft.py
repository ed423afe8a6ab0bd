"""PEFT opens the folder that `trifold publish --adapter` writes, over the folder that training started
from.
"""

from pathlib import Path

import pytest
import torch

from tests.modeling.huggingface import stock
from tests.published import batch_of, tokenizer
from tests.runtimes.folders import write_random
from trifold.modeling.config import Lora
from trifold.modeling.lora import add_lora
from trifold.pretrain.checkpoint import lease
from trifold.pretrain.checkpoint.slice import Slice
from trifold.pretrain.checkpoint.state import CheckpointState
from trifold.pretrain.checkpoint.writing import commit, find_origin, write_rank
from trifold.pretrain.publish.lora_adapter import publish_adapter
from trifold.pretrain.storage.disk import DiskPath

peft = pytest.importorskip("peft", reason="pip install 'trifold[runtimes]'")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.proof


@pytest.mark.parametrize(
    ("name", "auto_class"),
    [
        ("llama", "AutoModelForCausalLM"),
        ("modernbert", "AutoModelForMaskedLM"),
        ("t5gemma", "AutoModelForSeq2SeqLM"),
    ],
)
@torch.no_grad()
def test_published_adapters_give_our_logits_over_the_folder_they_began_from(
    name: str, auto_class: str, tmp_path: Path
) -> None:
    base, run, lora = (
        tmp_path / "base",
        tmp_path / "run",
        Lora(rank=3, alpha=5.0, targets=("q", "v", "up", "down")),
    )
    model = write_random(base, name)
    shape = model.config
    add_lora(model, lora, seed=1)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith(".b"):
            parameter.normal_(generator=torch.Generator().manual_seed(0))

    tokenizer().save(run / "tokenizer", shape.family)
    run_lease = lease.take_generation(DiskPath(run))
    folder = lease.checkpoint_folder(DiskPath(run), 1, run_lease.generation)
    write_rank(
        folder,
        run_lease,
        0,
        1,
        {n: Slice(0, tuple(p.shape), {"fp32": p.detach().flatten()}) for n, p in model.named_parameters()},
    )
    recipe = {"run": str(run), "model": {"from": str(base)}, "lora": lora.model_dump(mode="json")}
    config = shape.model_dump(mode="json")
    state = CheckpointState(1, 1, 1, [], "rows", recipe, config, lora_scale=lora.scale)
    commit(folder, run_lease, 1, state, find_origin(), timeout=5)

    out = publish_adapter(run, tmp_path / "adapter", on_event=lambda event, **facts: None)
    adapted = peft.PeftModel.from_pretrained(
        getattr(transformers, auto_class).from_pretrained(base, attn_implementation="eager"), out
    )
    batch = batch_of(shape, 9)
    ours = model.logits(batch)
    assert (stock.logits(adapted.eval(), batch) - ours).abs().max() <= 1e-5 * ours.abs().max()
    with adapted.disable_adapter():
        assert (stock.logits(adapted, batch) - ours).abs().max() > 0.1
