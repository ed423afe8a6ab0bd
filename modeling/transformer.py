"""The three families as compositions of one Stack (or RecurrentStack), made by `build(config, seed)`.

A model takes a Batch of packed rows and returns the losses of its targets, or logits. Shapes: B rows, T
tokens, S source tokens, D model, P picked positions, V vocabulary.
"""

import hashlib
import math
import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trifold.modeling.attention import Cache, Visibility
from trifold.modeling.batch import IGNORE, Batch
from trifold.modeling.block import AttentionContext, AttentionContexts, Block, Caches, is_local, make_norm
from trifold.modeling.config import ModelConfig
from trifold.modeling.errors import UserError
from trifold.modeling.heads import Head, Losses
from trifold.modeling.position import POSITION_SCHEMES, Learned
from trifold.modeling.recurrent.stack import RecurrentStack, score_function
from trifold.modeling.sequence_parallel import SequenceShard


class Transformer(nn.Module):
    """An encoder, a decoder, or both, between one embedding table and a head. Use `build` to make one."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        stack = Stack if config.cell == "attention" else RecurrentStack
        cross = config.family == "encoder-decoder"
        self.encoder = stack(config, causal=False) if config.family != "decoder" else None
        self.decoder = stack(config, causal=True, cross=cross) if config.family != "encoder" else None
        self.head = Head(config)

    def forward(self, batch: Batch) -> Losses:
        """The losses of the batch's targets: their sum, and each one's (B, T).

        With gradients recorded the sum has one; without, it is also known which targets are the most likely
        outputs.
        """
        h, targets = self.hidden(batch), batch.targets
        if batch.picked is not None:
            index = batch.picked.clamp(min=0)
            h = h.gather(1, index[..., None].expand(-1, -1, h.shape[-1]))
            targets = targets.gather(1, index).masked_fill(batch.picked < 0, IGNORE)

        losses = self.head.losses(h, self.embed, targets, batch.segments)
        if self.training and self.config.alignment == "hard":
            assert isinstance(self.decoder, RecurrentStack) and self.decoder.log_draws_BT is not None
            reinforce = score_function(losses.nll, self.decoder.log_draws_BT, targets, batch.segments)
            losses = losses._replace(total=losses.total + reinforce)
        return losses if batch.picked is None else _scatter_to_positions(losses, batch.picked, batch.targets)

    def logits(self, batch: Batch) -> Tensor:
        """Logits of every position, (B, T, V): for comparisons and predictions, not for training.

        With a CRF: at the positions that have targets (whatever these are), the score of the best label
        sequence with that label there.
        """
        scores = self.head.logits(self.hidden(batch), self.embed)
        if self.head.crf is None:
            return scores
        best: Tensor = self.head.crf(scores, batch.targets, batch.segments, best=True)
        return best

    def hidden(self, batch: Batch) -> Tensor:
        """The final hidden states (B, T, D) of the stack that predicts."""
        h_BTD = self.embedded(batch.tokens)
        if self.decoder is None:
            assert self.encoder is not None
            return self.encoder(self._with_types(h_BTD, batch.types), batch.segments)
        if self.encoder is None:
            return self.decoder(h_BTD, batch.segments)
        assert batch.source is not None
        memory_BSD = self.encoder(self.embedded(batch.source), batch.source_segments)
        return self.decoder(h_BTD, batch.segments, memory_BSD, batch.source_segments)

    def embedded(self, tokens_BT: Tensor) -> Tensor:
        return self.embed(tokens_BT) * self.config.embed_scale

    def _with_types(self, h_BTD: Tensor, types_BT: Tensor | None) -> Tensor:
        """Embeddings of tokens of these types. Positions add the row of type 0 to all of them, so that only
        the difference is added here.
        """
        position = self.encoder.position if isinstance(self.encoder, Stack) else None
        if types_BT is None or not isinstance(position, Learned) or self.config.token_types < 2:
            return h_BTD
        assert position.types is not None
        return h_BTD + position.types(types_BT) - position.types.weight[0]

    def recompute(self, on: bool) -> None:
        """Activation checkpointing by block (Chen et al. 2016): less memory for about a third more time."""
        if on and self.config.cell != "attention":
            raise UserError(
                "engine.recompute recomputes transformer blocks, and a model of cell"
                f" {self.config.cell} has none: set it to false."
            )
        for stack in (self.encoder, self.decoder):
            if stack is not None:
                stack.recompute = on

    def set_sequence_shard(self, shard: SequenceShard | None) -> None:
        """From now on batches hold one slice of each row (`SequenceShard.local`), and losses are a slice's.

        None: batches hold complete rows.
        """
        for stack in (self.encoder, self.decoder):
            if isinstance(stack, Stack):
                stack.shard = shard


def _scatter_to_positions(losses: Losses, picked_BP: Tensor, targets_BT: Tensor) -> Losses:
    """Losses of picked positions (B, P) at their positions in the rows, (B, T).

    The padding of `picked` has loss 0, so that it adds nothing to position 0.
    """
    index = picked_BP.clamp(min=0)

    def scatter(values_BP: Tensor) -> Tensor:
        return values_BP.new_zeros(targets_BT.shape).scatter_add(1, index, values_BP)

    correct = None if losses.correct is None else scatter(losses.correct.float()) > 0
    return Losses(losses.total, scatter(losses.nll), correct)


class Stack(nn.Module):
    """Blocks between an embedding norm and a final norm, causal or not, with or without cross-attention."""

    def __init__(self, config: ModelConfig, *, causal: bool, cross: bool = False) -> None:
        super().__init__()
        self.causal = causal
        self.window = config.local_window
        self.dropout = config.dropout
        self.position = POSITION_SCHEMES[config.position](config, causal)
        self.embed_norm = make_norm(config, config.embed_norm)
        self.blocks = nn.ModuleList(Block(config, layer, cross) for layer in range(config.num_layers))
        self.norm = make_norm(config, config.final_norm)
        self.recompute = False
        self.shard: SequenceShard | None = None

    def caches(self, length: int, memory_length: int) -> list[Caches]:
        """Empty key/value caches of all layers, for texts of up to `length` tokens."""
        return [(Cache(length), Cache(memory_length)) for _ in self.blocks]

    def forward(
        self,
        x_BTD: Tensor,
        segments_BT: Tensor | None,
        memory_BSD: Tensor | None = None,
        memory_segments_BS: Tensor | None = None,
        caches: list[Caches] | None = None,
    ) -> Tensor:
        """Hidden states (B, T, D).

        With caches, x continues the cached tokens and `segments` covers both: (B, used + T). Where ranks
        share rows, x and the encoder states are slices, but the segments are those of complete rows.
        """
        start = caches[0][0].used if caches else 0
        if self.shard is not None:
            start = self.shard.index * x_BTD.shape[1]
        end = start + x_BTD.shape[1]
        contexts = self._contexts(x_BTD, segments_BT, start, memory_BSD, memory_segments_BS)

        known_BT = _one_document(x_BTD, end) if segments_BT is None else segments_BT[:, :end]
        x_BTD = self.embed_norm(self.position(x_BTD, known_BT))
        x_BTD = F.dropout(x_BTD, self.dropout, self.training)
        for layer, block in enumerate(self.blocks):
            if caches:
                x_BTD = block(x_BTD, contexts, caches[layer])
            elif self.recompute and torch.is_grad_enabled():
                x_BTD = checkpoint(block, x_BTD, contexts, use_reentrant=False)
            else:
                x_BTD = block(x_BTD, contexts)
        return self.norm(x_BTD)

    def _contexts(
        self,
        x_BTD: Tensor,
        segments_BT: Tensor | None,
        start: int,
        memory_BSD: Tensor | None,
        memory_segments_BS: Tensor | None,
    ) -> AttentionContexts:
        """Masks, rotations and biases, computed once for all layers."""
        end, shard = start + x_BTD.shape[1], self.shard
        # The queries that attend on this rank: those of x, or where ranks share rows all of some heads.
        first, last = (start, end) if shard is None else (0, shard.size * x_BTD.shape[1])
        positions = torch.arange(last, device=x_BTD.device)
        bias = self.position.bias(positions[first:], positions)
        if shard is not None and bias is not None:
            bias = shard.local_heads(bias)

        def self_attention(window: int) -> AttentionContext:
            rotation = self.position.rotation(positions[start:end], local=window > 0)
            single = last - first == 1  # the newest token alone sees every key
            if segments_BT is None and bias is None and not window and (single or not first):
                return AttentionContext(Visibility(self.causal and not single), rotation, shard=shard)
            known_BT = _one_document(x_BTD, last) if segments_BT is None else segments_BT
            visibility = Visibility(self.causal, known_BT[:, first:], known_BT, window, first, bias)
            return AttentionContext(visibility, rotation, shard=shard)

        full = self_attention(window=0)
        local = self_attention(self.window) if self.window else full
        cross = None
        if memory_BSD is not None:  # each document reads its own source; positions play no role
            assert (segments_BT is None) == (memory_segments_BS is None)
            queries = None if segments_BT is None else segments_BT[:, first:]
            visibility = Visibility(False, queries, memory_segments_BS)
            cross = AttentionContext(visibility, memory_BSD=memory_BSD, shard=shard)
        return AttentionContexts(full, local, cross)


def _one_document(x_BTD: Tensor, length: int) -> Tensor:
    return torch.ones(len(x_BTD), length, dtype=torch.int64, device=x_BTD.device)


_QK_WEIGHT = re.compile(r"\w+\.blocks\.(\d+)\.attn\.f\.[qk]\.weight")


def build(config: ModelConfig, seed: int) -> Transformer:
    """A new model on the CPU in fp32. Equal (config, seed) give equal weights, on every machine."""
    with torch.device("meta"):
        model = Transformer(config)
    model.to_empty(device="cpu")
    initialise(model, seed)
    return model


def initialise(model: Transformer, seed: int) -> None:
    """Initialise all parameters. Each draws from its own generator, keyed by (seed, name).

    Norms are 1, biases 0. Matrices are normal with `init_std`; those that write into the residual stream (o,
    down) are smaller by sqrt(2 * num_layers), so that the stream's scale does not grow with depth (GPT-2).
    Where embeddings are scaled, their deviation is the inverse of the scale, so that the first block's input
    has unit scale (sqrt(dim), as in T5Gemma: dim ** -0.5). A matrix of a recurrent stack has the deviation
    fan-in ** -0.5, which keeps the scale over steps, and the forget gates of an LSTM start open, with a bias
    of 1 (Jozefowicz et al. 2015).
    """
    for name, parameter in model.named_parameters():
        reset(name, parameter, model.config, seed)


@torch.no_grad()
def reset(name: str, parameter: Tensor, config: ModelConfig, seed: int) -> None:
    """Initialise one parameter."""
    if name.rpartition(".")[2].startswith("bias"):
        parameter.zero_()
        if config.cell == "lstm" and "bias_ih" in name:
            forget = parameter.chunk(4)[1]  # input, forget, cell, output
            forget.fill_(1)
    elif parameter.ndim == 1:
        parameter.fill_(1)
    elif config.mimetic and (match := _QK_WEIGHT.fullmatch(name)) and not is_local(config, int(match[1])):
        _reset_mimetic(name, parameter, config, seed)
    else:
        std = config.init_std
        if name.endswith((".f.o.weight", ".f.down.weight")):
            std /= math.sqrt(2 * config.num_layers)
        elif name == "embed.weight" and config.embed_scale != 1:
            std = 1 / config.embed_scale
        elif config.cell != "attention" and not name.startswith(("embed.", "head.")):
            std = parameter.shape[1] ** -0.5
        parameter.normal_(0, std, generator=seeded_generator(seed, name))


def _reset_mimetic(name: str, parameter: Tensor, config: ModelConfig, seed: int) -> None:
    """Query heads equal to their key heads (Trockman and Kolter 2023).

    W_q^T W_k is then close to the identity, so that a token attends to equal tokens.
    """
    keys = parameter.new_empty(config.num_kv_heads * config.head_dim, config.dim)
    keys.normal_(0, config.dim**-0.5, generator=seeded_generator(seed, name.replace(".q.", ".k.")))
    heads = keys.unflatten(0, (config.num_kv_heads, -1))
    parameter.copy_(heads.repeat_interleave(len(parameter) // len(keys), dim=0).flatten(0, 1))


def seeded_generator(seed: int, name: str) -> torch.Generator:
    """The random generator of one parameter."""
    key = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(key, "big", signed=True))
