"""Does a stock class compute what our model computes? The checks of verify.py that run both models.

Our model, the stock one, and the table that names its tensors come in; named checks go out: logits, the loss
and gradients of one batch, tied weights, and text generated with either one's cache. Cost: a few hundred
tokens through each model, and a copy of the gradients of each.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trifold.modeling.batch import IGNORE, Batch
from trifold.modeling.config import ModelConfig
from trifold.modeling.generation.config import Generation
from trifold.modeling.generation.generate import generate
from trifold.modeling.huggingface.tables import Architecture, gradients
from trifold.modeling.transformer import Transformer

# Of the largest logit, at least 1. fp32 rounding gives up to 1.4e-5 in trained models; a softcap of 50
# changes 1e-2.
TOLERANCE = 5e-5
# Of the largest entry of a tensor's gradient, at least a hundredth of the model's largest.
GRADIENT_TOLERANCE = 1e-4
NEW_TOKENS = 20


class Check(NamedTuple):
    """The result of one check."""

    name: str
    ok: bool
    detail: str


def tied_weights(stock: Any, config: ModelConfig) -> Check:
    """The head and the embeddings are one tensor in memory, or two, as the config says."""
    head = stock.get_output_embeddings()
    if config.outputs or head is None:
        return Check("tied weights", True, "no LM head to tie")
    embed = stock.get_input_embeddings().weight
    if config.family == "encoder-decoder":  # where each stack has a table, the head is tied to the decoder's
        embed = stock.get_decoder().get_input_embeddings().weight
    is_tied = head.weight.data_ptr() == embed.data_ptr()
    detail = f"the head and the embeddings are {'one tensor' if is_tied else 'two tensors'}"
    return Check("tied weights", is_tied == config.tie_embeddings, detail)


def logits(ours: Transformer, stock: Any, pad: int) -> Check:
    """The largest difference over several lengths, the longest past the local windows. A bare class has no
    head: its hidden states are compared.
    """
    config, worst, largest = ours.config, 0.0, 1.0
    lengths = sorted({min(n, config.max_positions) for n in (1, 7, max(48, 3 * config.local_window))})
    for length in lengths:
        batch = _batch(config, pad, length)
        stock_scores = _scores(stock, batch)
        our_scores = ours.hidden(batch) if _is_bare(stock) else ours.logits(batch)
        worst = max(worst, (our_scores - stock_scores).abs().max().item())
        largest = max(largest, our_scores.abs().max().item())
    allowed = TOLERANCE * largest
    detail = (
        f"differ by at most {worst:.1e} at lengths {lengths} (allowed: {allowed:.1e}, the largest is"
        f" {largest:.1f})"
    )
    return Check("logits", worst <= allowed, detail)


def training(ours: Transformer, stock: Any, architecture: Architecture, pad: int) -> Check:
    """The mean loss of one batch, ours and torch's own over the stock logits, and the gradient of every
    tensor.

    What differs in fp32 is compared again in fp64: rounding disappears there (it reached 1.3e-4 in a random
    BERT on a CPU with AVX2), a mistake does not.
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
    our_loss = ours(batch).total / (batch.targets != IGNORE).sum()
    stock_loss = _loss(_scores(stock, batch), batch)
    our_loss.backward()
    stock_loss.backward()

    expected = gradients(architecture.table, ours.config, _shapes(ours), _stock_gradients(stock))
    computed = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    gaps = _gradient_gaps(computed, expected)
    worst = max(gaps, key=gaps.__getitem__)
    loss_gap = abs(our_loss.item() - stock_loss.item())
    for model in (ours, stock):
        model.zero_grad()

    detail = (
        f"losses differ by {loss_gap:.1e}, {len(gaps)} gradients by at most {gaps[worst]:.1e} of their"
        f" largest entry (in {worst})"
    )
    ok = loss_gap <= TOLERANCE * max(1.0, stock_loss.item()) and gaps[worst] <= GRADIENT_TOLERANCE
    return Check("training", ok, detail)


def _shapes(model: Transformer) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _stock_gradients(stock: Any) -> dict[str, Tensor]:
    """The gradient of each stock tensor by name, zero where it has none."""
    named = [*stock.named_parameters(remove_duplicate=False), *stock.named_buffers()]
    return {name: torch.zeros_like(tensor) if tensor.grad is None else tensor.grad for name, tensor in named}


def _gradient_gaps(computed: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """Of each tensor the largest difference, relative to the largest entry of its gradient."""
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    gaps = {}
    for name, gradient in computed.items():
        scale = max(expected[name].abs().max().item(), largest / 100)
        gaps[name] = ((gradient - expected[name]).abs().max() / scale).item()
    return gaps


def greedy(ours: Transformer, stock: Any, generation: Generation, special: Mapping[str, int]) -> Check:
    """The stock class with its cache and ours with ours write the same text under the folder's generation
    settings, taking the likeliest token each time.
    """
    config = ours.config
    prompt = _batch(config, special["pad"], min(9, config.max_positions - 1)).tokens[:1]
    new = min(NEW_TOKENS, config.max_positions - prompt.shape[1])
    settings = {"min_length": 0, "do_sample": False, "num_beams": 1, "repetition_penalty": 1.0}
    output = stock.generate(prompt, max_new_tokens=new, **settings)[0].tolist()
    stock_text = output[prompt.shape[1] if config.family == "decoder" else 1 :]

    generation = generation.model_copy(update={"max_new": new, "beams": 1, "sample": False})
    bos, eos, pad = special["bos"], special["eos"], special["pad"]
    our_text = generate(ours, prompt.tolist(), generation, bos=bos, eos=eos, pad=pad)[0]
    detail = f"{len(stock_text)} tokens with the cache"
    if our_text != stock_text:
        detail += f": {stock_text}, not {our_text}"
    return Check("greedy", our_text == stock_text, detail)


def reload(ours: Transformer, again: Transformer, special: Mapping[str, int]) -> Iterator[Check]:
    """For a model that no other library has: read back as `again`, it computes the same, and it writes with
    its cache what it predicts without one.
    """
    config, pad = again.config, special["pad"]
    batch = _batch(config, pad, 48)
    same = torch.equal(again.logits(batch), ours.logits(batch))
    detail = (
        f"read back, its logits are {'' if same else 'not '}equal to the last bit; there is no stock class"
    )
    yield Check("reload", same, detail)
    if config.family == "encoder" or config.outputs:
        return

    prompt = _batch(config, pad, 50).tokens[:1]
    settings = Generation(max_new=NEW_TOKENS)
    written = generate(again, prompt.tolist(), settings, bos=special["bos"], eos=-1, pad=pad)[0]
    is_decoder = config.family == "decoder"
    begin = prompt[0].tolist() if is_decoder else [special["bos"]]
    row = torch.tensor([begin + written[:-1]])
    scores = again.logits(Batch(row, None, row, None if is_decoder else prompt))
    predicted = scores[0, -NEW_TOKENS:].argmax(-1).tolist()
    detail = f"{len(written)} tokens with the cache"
    if written != predicted:
        detail += f": {written}, not {predicted}"
    yield Check("greedy", written == predicted, detail)


def _batch(config: ModelConfig, pad: int, length: int) -> Batch:
    """Two rows of arbitrary tokens with targets, the same each time; no padding, which the stock classes
    would mask.
    """
    draw = torch.Generator().manual_seed(length)

    def tokens(n: int) -> Tensor:
        drawn = torch.randint(0, config.vocab_size, (2, n), generator=draw)
        return torch.where(drawn == pad, (pad + 1) % config.vocab_size, drawn)

    target = tokens(length)
    has_source = config.family == "encoder-decoder"
    source = tokens(min(length + 2, config.max_positions)) if has_source else None
    targets = torch.randint(0, config.outputs or config.vocab_size, target.shape, generator=draw)
    if config.spans:  # start and end of an answer, in the first two positions
        targets = torch.full_like(target, IGNORE)
        targets[:, :2] = torch.randint(0, length, (2, min(2, length)), generator=draw)
    source_segments = None if source is None else torch.ones_like(source)
    return Batch(target, torch.ones_like(target), targets, source, source_segments)


def _is_bare(stock: Any) -> bool:
    """Whether a stock class has no head at all."""
    return stock.base_model is stock and not hasattr(stock, "lm_head")  # T5 is its own base model


def _scores(stock: Any, batch: Batch) -> Tensor:
    """The stock class's logits (B, T, V), or hidden states (B, T, D) where it has no head."""
    inputs = {"input_ids": batch.tokens}
    if batch.source is not None:
        inputs = {"input_ids": batch.source, "decoder_input_ids": batch.tokens}
    output = stock(**inputs)
    if "start_logits" in output:
        return torch.stack([output.start_logits, output.end_logits], dim=-1)
    return next(
        output[name] for name in ("logits", "prediction_logits", "last_hidden_state") if name in output
    )


def _loss(scores: Tensor, batch: Batch) -> Tensor:
    is_spans = batch.targets.shape[1] > 2 and batch.targets[:, 2:].eq(IGNORE).all()
    if is_spans:  # two choices among the positions of a row
        return F.cross_entropy(scores.transpose(1, 2).flatten(0, 1), batch.targets[:, :2].flatten())
    return F.cross_entropy(scores.flatten(0, 1), batch.targets.flatten())
