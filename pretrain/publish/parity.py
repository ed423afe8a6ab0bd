"""Does a stock class compute what our model computes? The part of the gate (pretrain/publish/verify.py) that
runs both.

In: our model, the stock one, and the table that names its tensors. Out: named checks: logits, one batch's
loss and gradients, tied weights, and generation with either one's cache. Cost: a few hundred tokens through
each model, and a copy of the gradients of each.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trifold.modeling.batch import IGNORE, Batch
from trifold.modeling.config import Generation, ModelConfig
from trifold.modeling.generation.generate import generate
from trifold.modeling.huggingface.tables import Architecture, gradients
from trifold.modeling.transformer import Transformer

# of the largest logit (at least 1): fp32 rounding gives up to 1.4e-5 in trained models, a softcap of 50
# changes 1e-2
TOLERANCE = 5e-5
GRADIENT_TOLERANCE = (
    1e-4  # of the largest entry of a tensor's gradient (at least a hundredth of the model's largest)
)
NEW_TOKENS = 20


class Check(NamedTuple):
    """One thing the gate looked at."""

    name: str
    ok: bool
    detail: str


def check_tied(stock: Any, config: ModelConfig) -> Check:
    """The head and the embeddings are one tensor in memory, or two, as the config says."""
    head = stock.get_output_embeddings()
    if config.outputs or head is None:
        return Check("tied weights", True, "no head over the vocabulary here that could share its weights")
    embed = stock.get_input_embeddings().weight
    if config.family == "encoder-decoder":  # where each stack has a table, the head is tied to the decoder's
        embed = stock.get_decoder().get_input_embeddings().weight
    one = head.weight.data_ptr() == embed.data_ptr()
    return Check(
        "tied weights",
        one == config.tie_embeddings,
        f"the head and the embeddings are {'one tensor' if one else 'two tensors'}",
    )


def logits(ours: Transformer, stock: Any, pad: int) -> Check:
    """The largest difference over several lengths, the longest past the local windows; of a bare class, that
    of its hidden states.
    """
    config, worst, largest = ours.config, 0.0, 1.0
    lengths = sorted({min(n, config.max_positions) for n in (1, 7, max(48, 3 * config.local_window))})
    for length in lengths:
        batch = _batch(config, pad, length)
        theirs = _scores(stock, batch)
        mine = ours.hidden(batch) if _bare(stock) else ours.logits(batch)
        worst, largest = max(worst, (mine - theirs).abs().max().item()), max(largest, mine.abs().max().item())
    said = f"differ by at most {worst:.1e} at lengths {lengths} (allowed: {TOLERANCE * largest:.1e}, they reach {largest:.1f})"
    return Check("logits", worst <= TOLERANCE * largest, said)


def training(ours: Transformer, stock: Any, architecture: Architecture, pad: int) -> Check:
    """The mean loss of one batch, ours and torch's own over the stock logits, and the gradient of every
    tensor.

    What differs in fp32 is looked at again in fp64: rounding is gone there (it reached 1.3e-4 in a random
    BERT on a CPU with AVX2), and a mistake is not.
    """
    check = _training(ours, stock, architecture, pad)
    if not check.ok:
        check = _training(ours.double(), stock.double(), architecture, pad)
        for model in (ours, stock):
            model.float()
    return check


@torch.enable_grad()
def _training(ours: Transformer, stock: Any, architecture: Architecture, pad: int) -> Check:
    batch = _batch(ours.config, pad, min(24, ours.config.max_positions))
    mine, theirs = ours(batch) / (batch.targets != IGNORE).sum(), _loss(_scores(stock, batch), batch)
    mine.backward()
    theirs.backward()
    named = [*stock.named_parameters(remove_duplicate=False), *stock.named_buffers()]
    given = {name: torch.zeros_like(tensor) if tensor.grad is None else tensor.grad for name, tensor in named}
    shapes = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    wanted = gradients(architecture.table, ours.config, shapes, given)
    found = {
        name: parameter.grad for name, parameter in ours.named_parameters() if parameter.grad is not None
    }
    top = max(gradient.abs().max().item() for gradient in wanted.values())
    gaps = {
        name: ((gradient - wanted[name]).abs().max() / max(wanted[name].abs().max().item(), top / 100)).item()
        for name, gradient in found.items()
    }
    name, gap, loss = max(gaps, key=gaps.__getitem__), max(gaps.values()), abs(mine.item() - theirs.item())
    for model in (ours, stock):
        model.zero_grad()
    said = f"losses differ by {loss:.1e}, {len(gaps)} gradients by at most {gap:.1e} of their largest entry (in {name})"
    return Check("training", loss <= TOLERANCE * max(1.0, theirs.item()) and gap <= GRADIENT_TOLERANCE, said)


def greedy(ours: Transformer, stock: Any, how: Generation, special: Mapping[str, int]) -> Check:
    """The stock class with its cache and the folder's generation settings, and ours with ours; the likeliest
    token each time.
    """
    config = ours.config
    prompt = _batch(config, special["pad"], min(9, config.max_positions - 1)).tokens[:1]
    new = min(NEW_TOKENS, config.max_positions - prompt.shape[1])
    other = stock.generate(prompt, max_new_tokens=new, min_length=0, do_sample=False, num_beams=1)[0].tolist()
    other = other[prompt.shape[1] if config.family == "decoder" else 1 :]
    how = how.model_copy(update={"max_new": new, "beams": 1, "sample": False})
    mine = generate(ours, prompt.tolist(), how, bos=special["bos"], eos=special["eos"], pad=special["pad"])[0]
    return Check(
        "greedy",
        mine == other,
        f"{len(other)} tokens with the cache" + ("" if mine == other else f": {other}, not {mine}"),
    )


def is_isolated(ours: Transformer, again: Transformer, special: Mapping[str, int]) -> Iterator[Check]:
    """What can be asked of a model that no other library knows: read back, does it say the same, and does it
    write what it says?
    """
    config, pad = again.config, special["pad"]
    batch = _batch(config, pad, 48)
    same = torch.equal(again.logits(batch), ours.logits(batch))
    yield Check(
        "reload",
        same,
        f"read back, its logits are {'' if same else 'not '}the same to the last bit; there is no stock"
        " class",
    )
    if config.family == "encoder" or config.outputs:
        return
    prompt = _batch(config, pad, 50).tokens[:1]
    written = generate(
        again, prompt.tolist(), Generation(max_new=NEW_TOKENS), bos=special["bos"], eos=-1, pad=pad
    )[0]
    begin = prompt[0].tolist() if config.family == "decoder" else [special["bos"]]
    row = torch.tensor([begin + written[:-1]])
    said = (
        again.logits(Batch(row, None, row, None if config.family == "decoder" else prompt))[0, -NEW_TOKENS:]
        .argmax(-1)
        .tolist()
    )
    yield Check(
        "greedy",
        written == said,
        f"{len(written)} tokens with the cache" + ("" if written == said else f": {written}, not {said}"),
    )


def _batch(config: ModelConfig, pad: int, length: int) -> Batch:
    """Two rows of arbitrary tokens with targets, the same each time; no padding, which the stock classes
    would mask.
    """
    draw = torch.Generator().manual_seed(length)

    def tokens(n: int) -> Tensor:
        some = torch.randint(0, config.vocab_size, (2, n), generator=draw)
        return torch.where(some == pad, (pad + 1) % config.vocab_size, some)

    x, source = (
        tokens(length),
        tokens(min(length + 2, config.max_positions)) if config.family == "encoder-decoder" else None,
    )
    targets = torch.randint(0, config.outputs or config.vocab_size, x.shape, generator=draw)
    if config.spans:  # where an answer begins and ends, and nothing else
        targets = torch.full_like(x, IGNORE)
        targets[:, :2] = torch.randint(0, length, (2, min(2, length)), generator=draw)
    return Batch(x, torch.ones_like(x), targets, source, None if source is None else torch.ones_like(source))


def _bare(stock: Any) -> bool:
    """Whether a stock class has no head at all."""
    return stock.base_model is stock and not hasattr(stock, "lm_head")  # T5 is its own base model


def _scores(stock: Any, batch: Batch) -> Tensor:
    """The stock class's logits (B, T, V), or hidden states (B, T, D) where it has no head."""
    inputs = (
        {"input_ids": batch.tokens}
        if batch.source is None
        else {"input_ids": batch.source, "decoder_input_ids": batch.tokens}
    )
    out = stock(**inputs)
    if "start_logits" in out:
        return torch.stack([out.start_logits, out.end_logits], dim=-1)
    return next(out[name] for name in ("logits", "prediction_logits", "last_hidden_state") if name in out)


def _loss(scores: Tensor, batch: Batch) -> Tensor:
    answers = batch.targets[:, 2:].eq(IGNORE).all() and batch.targets.shape[1] > 2
    if answers:  # two choices among the positions of a row
        return F.cross_entropy(scores.transpose(1, 2).flatten(0, 1), batch.targets[:, :2].flatten())
    return F.cross_entropy(scores.flatten(0, 1), batch.targets.flatten())
