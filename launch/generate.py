"""What `trifold generate` does: a published folder and a text in, the model's text out. The model runs here, on the CPU."""

from pathlib import Path

from modeling.generate import generate
from modeling.transformer import Transformer
from pretrain import published
from pretrain.tokenizer import Tokenizer


def write(folder: Path, text: str, max_new: int) -> str:
    """A decoder's continuation of the text (the text first), or what an encoder-decoder makes of it. Raises Refused for an encoder."""
    config, state = published.load(folder)
    tokenizer = Tokenizer.open(folder)
    model = Transformer(config)
    model.load_state_dict(state)
    ids = tokenizer.encode_batch([text])[0].tolist()
    prompt = [tokenizer.bos, *ids] if config.family == "decoder" else [tokenizer.bos, *ids, tokenizer.eos]
    [made] = generate(model, [prompt], max_new=max_new, bos=tokenizer.bos, eos=tokenizer.eos, pad=tokenizer.pad)
    marks = {tokenizer.bos, tokenizer.eos, tokenizer.pad}
    return (text if config.family == "decoder" else "") + tokenizer.decode([i for i in made if i not in marks])
