"""What `trifold generate` does: a published folder and a text in, the model's text out. The model runs here, on the CPU."""

from pathlib import Path

import torch

from modeling.batch import Batch
from modeling.generate import generate
from modeling.transformer import Transformer
from pretrain import published
from pretrain.tokenizer import Tokenizer


def write(folder: Path, text: str, max_new: int) -> str:
    """A decoder continues the text, an encoder-decoder answers it, an encoder fills in each `<mask>` of it."""
    config, state = published.load(folder)
    tokenizer = Tokenizer.open(folder)
    model = Transformer(config)
    model.load_state_dict(state)
    ids = tokenizer.encode_batch([text])[0].tolist()
    if config.family == "encoder":
        return tokenizer.decode(_filled(model, [tokenizer.bos, *ids, tokenizer.eos], tokenizer.mask)[1:-1])
    prompt = [tokenizer.bos, *ids] if config.family == "decoder" else [tokenizer.bos, *ids, tokenizer.eos]
    [made] = generate(model, [prompt], max_new=max_new, bos=tokenizer.bos, eos=tokenizer.eos, pad=tokenizer.pad)
    marks = {tokenizer.bos, tokenizer.eos, tokenizer.pad}
    return (text if config.family == "decoder" else "") + tokenizer.decode([i for i in made if i not in marks])


@torch.no_grad()
def _filled(model: Transformer, ids: list[int], mask: int) -> list[int]:
    """The ids with the likeliest token in place of each mask."""
    tokens = torch.tensor([ids])
    best = model.logits(Batch(tokens, None, tokens)).argmax(-1)
    return torch.where(tokens == mask, best, tokens)[0].tolist()
