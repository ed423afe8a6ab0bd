"""The three families as compositions of one Stack (or RecurrentStack), and the one way to make them:
`build(config, seed)`.

In: a Batch of packed rows. Out: the summed loss of its valid targets (fp32), or each target's loss, or
logits. Shapes: B rows, T tokens, S source, D model, P picked, V vocabulary.
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
from trifold.modeling.heads import Head
from trifold.modeling.position import POSITION_SCHEMES, Learned
from trifold.modeling.recurrent.stack import RecurrentStack, score_function
from trifold.modeling.sequence_parallel import SequenceShard


class Transformer(nn.Module):
    """Encoder, decoder, or both, between one table of embeddings and a head. Made by `build`, not called
    directly.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        both, stack = (
            config.family == "encoder-decoder",
            Stack if config.cell == "attention" else RecurrentStack,
        )
        self.encoder = stack(config, causal=False) if config.family != "decoder" else None
        self.decoder = stack(config, causal=True, cross=both) if config.family != "encoder" else None
        self.head = Head(config)

    def forward(
        self, batch: Batch, per_token: bool = False, logits: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The sum of the losses (nats, fp32 scalar); `per_token`: losses (B, T) and correctness (B, T) bool;
        `logits`: (B, T, V).

        Of a batch in parts: the sum, and the losses (B, T), which carry no gradient.
        """
        h, targets = self.hidden(batch), batch.targets
        if logits:
            scores = self.head(h, self.embed)
            return (
                scores if self.head.crf is None else self.head.crf(scores, targets, batch.segments, best=True)
            )
        if batch.picked is not None:
            at = batch.picked.clamp(min=0)
            h = h.gather(1, at[..., None].expand(-1, -1, h.shape[-1]))
            targets = targets.gather(1, at).masked_fill(batch.picked < 0, IGNORE)

        def at_home(x_BP: Tensor) -> Tensor:
            """Back to their places; the padding of `picked` adds nothing to place 0."""
            return (
                x_BP if batch.picked is None else x_BP.new_zeros(batch.targets.shape).scatter_add(1, at, x_BP)
            )

        if per_token:
            nll, correct = self.head(h, self.embed, targets, batch.segments, per_token=True)
            return at_home(nll), at_home(correct.float()) > 0
        draws = self.training and self.config.alignment == "hard"
        if batch.parts is None and not draws:
            return self.head(h, self.embed, targets, batch.segments)
        total, nll = self.head(h, self.embed, targets, batch.segments, each=True)
        if draws:
            assert isinstance(self.decoder, RecurrentStack) and self.decoder.log_draws_BT is not None
            total = total + score_function(nll, self.decoder.log_draws_BT, targets, batch.segments)
        return total if batch.parts is None else (total, at_home(nll))

    def logits(self, batch: Batch) -> Tensor:
        """Logits of every position, (B, T, V): for comparisons and generation, not for training. With a CRF:
        of the positions that have targets (whatever they are), the score of the best sequence of labels with
        that label there.
        """
        return self(batch, logits=True)

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
        """Activation checkpointing, block by block (Chen et al. 2016): less memory for about a third more
        time.
        """
        if on and self.config.cell != "attention":
            raise UserError(
                f"engine.recompute goes block by block, and a model of cell {self.config.cell} has no"
                " blocks: set it to false."
            )
        for stack in (self.encoder, self.decoder):
            if stack is not None:
                stack.recompute = on

    def set_sequence_shard(self, shared: SequenceShard | None) -> None:
        """From here on batches hold slices of rows (`Shared.own`), and losses are a slice's; None: whole
        rows.
        """
        for stack in (self.encoder, self.decoder):
            if isinstance(stack, Stack):
                stack.shared = shared


class Stack(nn.Module):
    """Blocks between an embedding norm and a final norm, causal or not, with cross-attention or not."""

    def __init__(self, config: ModelConfig, *, causal: bool, cross: bool = False) -> None:
        super().__init__()
        self.causal, self.window, self.dropout = causal, config.local_window, config.dropout
        self.position = POSITION_SCHEMES[config.position](config, causal)
        self.embed_norm = make_norm(config, config.embed_norm)
        self.blocks = nn.ModuleList(Block(config, layer, cross) for layer in range(config.num_layers))
        self.norm = make_norm(config, config.final_norm)
        self.recompute = False
        self.shared: SequenceShard | None = None

    def caches(self, length: int, memory_length: int) -> list[Caches]:
        """What generation of texts up to `length` keeps, layer by layer."""
        return [(Cache(length), Cache(memory_length)) for _ in self.blocks]

    def forward(
        self,
        x_BTD: Tensor,
        segments_BT: Tensor | None,
        memory_BSD: Tensor | None = None,
        memory_segments_BS: Tensor | None = None,
        caches: list[Caches] | None = None,
    ) -> Tensor:
        """Hidden states (B, T, D). With caches the tokens continue those in them, and `segments` covers both:
        (B, used + T). Of shared rows x and the memory are slices, the segments those of whole rows.
        """
        start = caches[0][0].used if caches else 0
        so_far_BT = segments_BT  # to the end of x
        if self.shared is not None:
            start = self.shared.place * x_BTD.shape[1]
            so_far_BT = None if segments_BT is None else segments_BT[:, : start + x_BTD.shape[1]]
        views = self._views(x_BTD, segments_BT, start, memory_BSD, memory_segments_BS)
        x_BTD = self.embed_norm(
            self.position(
                x_BTD, _one_document(x_BTD, start + x_BTD.shape[1]) if so_far_BT is None else so_far_BT
            )
        )
        x_BTD = F.dropout(x_BTD, self.dropout, self.training)
        for layer, block in enumerate(self.blocks):
            if caches:
                x_BTD = block(x_BTD, views, caches[layer])
            elif self.recompute and torch.is_grad_enabled():
                x_BTD = checkpoint(block, x_BTD, views, use_reentrant=False)
            else:
                x_BTD = block(x_BTD, views)
        return self.norm(x_BTD)

    def _views(
        self,
        x_BTD: Tensor,
        segments_BT: Tensor | None,
        start: int,
        memory_BSD: Tensor | None,
        memory_segments_BS: Tensor | None,
    ) -> AttentionContexts:
        """Masks, rotations and biases, made once for all layers."""
        end, shared = start + x_BTD.shape[1], self.shared
        first, last = (
            (start, end) if shared is None else (0, shared.size * x_BTD.shape[1])
        )  # of the queries that attend here
        at = torch.arange(last, device=x_BTD.device)
        bias = self.position.bias(at[first:], at)
        if shared is not None and bias is not None:
            bias = shared.local_heads(bias)

        def view(window: int) -> AttentionContext:
            rotation = self.position.rotation(at[start:end], local=window > 0)
            newest = last - first == 1  # sees all that there is
            if segments_BT is None and bias is None and not window and (newest or not first):
                return AttentionContext(Visibility(self.causal and not newest), rotation, shared=shared)
            known_BT = _one_document(x_BTD, last) if segments_BT is None else segments_BT
            return AttentionContext(
                Visibility(self.causal, known_BT[:, first:], known_BT, window, first, bias),
                rotation,
                shared=shared,
            )

        whole, cross = view(window=0), None
        if memory_BSD is not None:  # each document reads its own source; positions play no part
            assert (segments_BT is None) == (memory_segments_BS is None)
            queries = None if segments_BT is None else segments_BT[:, first:]
            cross = AttentionContext(
                Visibility(False, queries, memory_segments_BS), memory_BSD=memory_BSD, shared=shared
            )
        return AttentionContexts(whole, view(self.window) if self.window else whole, cross)


def _one_document(x_BTD: Tensor, length: int) -> Tensor:
    return torch.ones(len(x_BTD), length, dtype=torch.int64, device=x_BTD.device)


_QK_WEIGHT = re.compile(r"\w+\.blocks\.(\d+)\.attn\.f\.[qk]\.weight")


def build(config: ModelConfig, seed: int) -> Transformer:
    """A new model on the CPU in fp32, the same for the same (config, seed) wherever and in whatever order it
    is made.
    """
    with torch.device("meta"):
        model = Transformer(config)
    model.to_empty(device="cpu")
    initialise(model, seed)
    return model


def initialise(model: Transformer, seed: int) -> None:
    """All initialisation. Each parameter draws from a generator of its own, keyed by (seed, name).

    Norms are 1, biases 0. Matrices are normal with `init_std`; those that write into the residual stream (o,
    down) are smaller by sqrt(2 * num_layers), so that the stream keeps its scale with depth (GPT-2). Where
    embeddings are scaled up, their deviation is the inverse, so that what enters the first block has unit
    scale (sqrt(dim), as in T5Gemma: dim ** -0.5). A matrix of a recurrent stack has the deviation fan-in **
    -0.5, which keeps the scale over steps, and an LSTM's forget gates begin open, with a bias of 1
    (Jozefowicz et al. 2015).
    """
    for name, parameter in model.named_parameters():
        reset(name, parameter, model.config, seed)


@torch.no_grad()
def reset(name: str, parameter: Tensor, config: ModelConfig, seed: int) -> None:
    """Initialise one parameter."""
    if name.rpartition(".")[2].startswith("bias"):
        parameter.zero_()
        if config.cell == "lstm" and "bias_ih" in name:
            parameter.chunk(4)[1].fill_(1)  # input, forget, cell, output
    elif parameter.ndim == 1:
        parameter.fill_(1)
    elif config.mimetic and (match := _QK_WEIGHT.fullmatch(name)) and not is_local(config, int(match[1])):
        # W_q^T W_k is then close to the identity (Trockman and Kolter 2023): a token looks at tokens equal to
        # it
        keys = parameter.new_empty(config.num_kv_heads * config.head_dim, config.dim)
        keys.normal_(0, config.dim**-0.5, generator=seeded_generator(seed, name.replace(".q.", ".k.")))
        heads = keys.unflatten(0, (config.num_kv_heads, -1))
        parameter.copy_(heads.repeat_interleave(len(parameter) // len(keys), dim=0).flatten(0, 1))
    else:
        std = config.init_std
        if name.endswith((".f.o.weight", ".f.down.weight")):
            std /= math.sqrt(2 * config.num_layers)
        elif name == "embed.weight" and config.embed_scale != 1:
            std = 1 / config.embed_scale
        elif config.cell != "attention" and not name.startswith(("embed.", "head.")):
            std = parameter.shape[1] ** -0.5
        parameter.normal_(0, std, generator=seeded_generator(seed, name))


def seeded_generator(seed: int, name: str) -> torch.Generator:
    """The random numbers of one parameter."""
    key = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(key, "big", signed=True))
