"""The recurrent line: RecurrentStack stands where a transformer has its Stack, with the same forward, and so
does all that is built on it.

In: embeddings of packed rows (and the memory that an encoder made). Out: hidden states; each document starts
from a state of its own. Encoders read both ways, half of the width each. A decoder begins from its source's
last states alone (`alignment: none`, the fixed context vector: Sutskever et al. 2014, Cho et al. 2014), or
looks at all source states at every step (additive: Bahdanau et al. 2015; multiplicative, with input feeding:
Luong et al. 2015; hard, one drawn state: Xu et al. 2015). Teacher forcing is always whole. Cost on one core,
D 256, two layers, forward and backward of 1,280 tokens: LSTM 75 ms, GRU 78, RNN 23; with an alignment, which
must go step by step, about twice that. Shapes: B rows, T tokens, S source, D model, N documents, P = B * T, L
layers.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from trifold.modeling.batch import IGNORE
from trifold.modeling.config import ModelConfig
from trifold.modeling.recurrent.documents import Documents, split_documents

CELLS: dict[str, type[nn.RNN | nn.LSTM | nn.GRU]] = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}

Cells = tuple[Tensor, ...]  # h, and of an LSTM c: each (L, N, D)


@dataclass(frozen=True)
class AlignmentSources:
    """The source of each document, as an alignment reads it."""

    states_NSD: Tensor
    keys_NSD: Tensor
    there_NS: Tensor  # bool

    def of(self, documents: Tensor | slice) -> "AlignmentSources":
        return AlignmentSources(
            self.states_NSD[documents], self.keys_NSD[documents], self.there_NS[documents]
        )


@dataclass(frozen=True)
class CellState:
    """Where each document stands between two steps."""

    cells: Cells
    fed_ND: Tensor | None = None  # input feeding: the step's last output
    sources: AlignmentSources | None = None

    def of(self, documents: Tensor | slice) -> "CellState":
        """Of these documents, in this order."""
        cells = tuple(state[:, documents].contiguous() for state in self.cells)
        fed = None if self.fed_ND is None else self.fed_ND[documents]
        return CellState(cells, fed, None if self.sources is None else self.sources.of(documents))


@dataclass
class StateCache:
    """What generation keeps instead of keys and values: one state a row, however long the text is."""

    used: int = 0
    state: CellState | None = None

    def repeat(self, times: int) -> None:
        """Go on with as many copies of each row, side by side."""
        if self.state is not None:
            rows = self.state.cells[0].shape[1]
            self.reorder(torch.arange(rows, device=self.state.cells[0].device).repeat_interleave(times), 0)

    def reorder(self, rows_B: Tensor, begin: int) -> None:
        """Go on with these rows of the batch, in this order."""
        assert self.state is not None
        self.state = self.state.of(rows_B)


class RecurrentStack(nn.Module):
    """Layers of one fused kernel, causal or reading both ways, with a source to begin from and to look at, or
    without.
    """

    def __init__(self, config: ModelConfig, *, causal: bool, cross: bool = False) -> None:
        super().__init__()
        aligned = cross and config.alignment != "none"
        self.dropout, self.feeds = config.dropout, config.alignment == "multiplicative"
        self.cells = CELLS[config.cell](
            config.dim * (2 if aligned else 1),
            config.dim if causal else config.dim // 2,
            config.num_layers,
            dropout=config.dropout if config.num_layers > 1 else 0.0,
            bidirectional=not causal,
        )
        states = 2 if config.cell == "lstm" else 1
        self.bridge = nn.Linear(config.dim, states * config.num_layers * config.dim) if cross else None
        self.align = Alignment(config) if aligned else None
        self.combine = nn.Linear(2 * config.dim, config.dim) if aligned else None
        self.log_draws_BT: Tensor | None = None  # of a forward that drew: log-probabilities of what it drew

    def caches(self, length: int, memory_length: int) -> list[tuple[StateCache]]:
        return [(StateCache(),)]

    def forward(
        self,
        x_BTD: Tensor,
        segments_BT: Tensor | None,
        memory_BSD: Tensor | None = None,
        memory_segments_BS: Tensor | None = None,
        caches: Sequence[tuple[StateCache]] | None = None,
    ) -> Tensor:
        """Hidden states (B, T, D). With caches the tokens continue those that were read, and `segments`
        covers both: (B, used + T).
        """
        cache = caches[0][0] if caches else StateCache()
        segments = _one_document(x_BTD) if segments_BT is None else segments_BT[:, cache.used :]
        documents, state = split_documents(segments), cache.state
        if state is None and memory_BSD is not None:
            source = split_documents(
                _one_document(memory_BSD) if memory_segments_BS is None else memory_segments_BS
            )
            state = self._begin(documents, source, memory_BSD)
        x_PD = documents.take(F.dropout(x_BTD, self.dropout, self.training))
        if self.align is None:
            y_PD, state = self._run(x_PD, documents.sizes_T, state)
        else:
            assert state is not None
            y_PD, state = self._step_by_step(x_PD, documents, state)
        if caches:
            cache.used, cache.state = cache.used + x_BTD.shape[1], state.of(documents.at_row_ends())
        return F.dropout(documents.put(y_PD), self.dropout, self.training)

    def _run(self, x_PD: Tensor, sizes_T: Tensor, state: CellState | None) -> tuple[Tensor, CellState]:
        lstm = isinstance(self.cells, nn.LSTM)
        before = None if state is None else state.cells if lstm else state.cells[0]
        with _kernels(x_PD):
            packed, after = self.cells(PackedSequence(x_PD, sizes_T), before)
        cells = after if lstm else (after,)
        return packed.data, CellState(cells) if state is None else replace(state, cells=cells)

    def _begin(self, documents: Documents, source: Documents, memory_BSD: Tensor) -> CellState:
        """The first state of each document, made of the last states of its source, read forward and read
        backward.
        """
        assert self.bridge is not None
        same_NM = (documents.row_N[:, None] == source.row_N) & (
            documents.segment_N[:, None] == source.segment_N
        )
        mine_N, found_N = same_NM.int().argmax(1), same_NM.any(1)
        forward, backward = memory_BSD.flatten(0, 1).chunk(2, dim=-1)
        last_MD = torch.cat([forward[source.first_N + source.length_N - 1], backward[source.first_N]], dim=-1)
        first_ND = self.bridge(last_MD[mine_N] * found_N[:, None]).tanh()
        cells = (
            first_ND.unflatten(-1, (-1, self.cells.num_layers, self.cells.hidden_size))
            .permute(1, 2, 0, 3)
            .contiguous()
        )
        if self.align is None:
            return CellState(tuple(cells))
        places, there = source.table()
        states_NSD = memory_BSD.flatten(0, 1)[places[mine_N]]
        sources = AlignmentSources(
            states_NSD, self.align.score.key(states_NSD), there[mine_N] & found_N[:, None]
        )
        return CellState(tuple(cells), torch.zeros_like(cells[0, -1]), sources)

    def _step_by_step(self, x_PD: Tensor, documents: Documents, state: CellState) -> tuple[Tensor, CellState]:
        """Additive and hard: the state before a step says where to look, and what is seen goes into the step.
        Multiplicative: the state after it says so, and the step's output goes into the next one. Both: out =
        tanh(W [seen, h]).
        """
        assert self.align is not None and self.combine is not None
        made: list[Tensor] = []
        drawn: list[Tensor] = []
        for x_ND in x_PD.split(documents.sizes_T.tolist()):
            state = state.of(slice(len(x_ND)))
            assert state.fed_ND is not None and state.sources is not None
            seen, log_draw, _ = (
                (state.fed_ND, None, None) if self.feeds else self.align(state.cells[0][-1], state.sources)
            )
            h_ND, after = self._run(torch.cat([x_ND, seen], dim=-1), torch.tensor([len(x_ND)]), state)
            if self.feeds:
                seen, log_draw, _ = self.align(h_ND, state.sources)
            out_ND = self.combine(torch.cat([seen, h_ND], dim=-1)).tanh()
            state = replace(after, fed_ND=out_ND)
            made.append(out_ND)
            if log_draw is not None:
                drawn.append(log_draw)
        self.log_draws_BT = documents.put(torch.cat(drawn)) if drawn else None
        return torch.cat(made), state


class Alignment(nn.Module):
    """Where in its source each document looks: the mean of the source's states under softmax(scores), or one
    of them.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.score = SCORES[config.alignment](config.dim)
        self.hard = config.alignment == "hard"

    def forward(self, h_ND: Tensor, sources: AlignmentSources) -> tuple[Tensor, Tensor | None, Tensor]:
        """What is seen (N, D), the log-probability of what was drawn (N,), and the weights (N, S).

        Hard attention draws from torch's global generator, which the training loop keys by (seed, micro) as
        it does for dropout; out of training it takes the likeliest state.
        """
        scores_NS = self.score(h_ND, sources.keys_NSD).masked_fill(~sources.there_NS, -1e4)
        weights_NS = scores_NS.softmax(-1) * sources.there_NS  # a document without a source sees zeros
        if not self.hard:
            return torch.einsum("ns,nsd->nd", weights_NS, sources.states_NSD), None, weights_NS
        probabilities = scores_NS.detach().float().softmax(-1)
        place_N1 = (
            torch.multinomial(probabilities, 1) if self.training else probabilities.argmax(-1, keepdim=True)
        )
        seen_ND = sources.states_NSD.gather(1, place_N1[..., None].expand(-1, 1, h_ND.shape[-1]))[:, 0]
        log_draw_N = scores_NS.log_softmax(-1).gather(1, place_N1)[:, 0] if self.training else None
        return seen_ND * sources.there_NS[:, :1], log_draw_N, weights_NS


class Additive(nn.Module):
    """v tanh(W s + U h) (Bahdanau et al. 2015, A.1.2)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query, self.key, self.v = (nn.Linear(dim, width, bias=False) for width in (dim, dim, 1))

    def forward(self, h_ND: Tensor, keys_NSD: Tensor) -> Tensor:
        return self.v((self.query(h_ND)[:, None] + keys_NSD).tanh())[..., 0]


class Multiplicative(nn.Module):
    """s W h (Luong et al. 2015, `general`)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.key = nn.Linear(dim, dim, bias=False)

    def forward(self, h_ND: Tensor, keys_NSD: Tensor) -> Tensor:
        return torch.einsum("nd,nsd->ns", h_ND, keys_NSD)


SCORES: dict[str, type[Additive | Multiplicative]] = {
    "additive": Additive,
    "multiplicative": Multiplicative,
    "hard": Additive,
}


def _kernels(x: Tensor) -> AbstractContextManager[None]:
    """Under autocast torch asks oneDNN for a bf16 LSTM, also on a CPU that has none: there torch's own is
    taken.
    """
    if x.is_cpu and torch.is_autocast_enabled("cpu") and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.backends.mkldnn.flags(enabled=False)
    return nullcontext()


def score_function(
    nll_BT: Tensor, log_draws_BT: Tensor, targets_BT: Tensor, segments_BT: Tensor | None
) -> Tensor:
    """Zero, with the gradient that the sum of losses owes to the draws (Williams 1992): each log-probability
    times the losses from its step on, less what as many targets cost on average in the other documents of the
    batch: a baseline that no draw of its own moves.
    """
    documents = split_documents(torch.ones_like(targets_BT) if segments_BT is None else segments_BT)
    places, there = documents.table()

    def to_go(x_BT: Tensor) -> Tensor:
        return (x_BT.flatten()[places] * there).flip(1).cumsum(1).flip(1)

    losses, targets = to_go(nll_BT), to_go((targets_BT != IGNORE).to(nll_BT.dtype))
    elsewhere = (losses[:, 0].sum() - losses[:, :1]) / (targets[:, 0].sum() - targets[:, :1]).clamp(min=1)
    term = (log_draws_BT.flatten()[places] * there * (losses - elsewhere * targets).detach()).sum()
    return term - term.detach()


def _one_document(x_BTD: Tensor) -> Tensor:
    return torch.ones(x_BTD.shape[:2], dtype=torch.int64, device=x_BTD.device)
