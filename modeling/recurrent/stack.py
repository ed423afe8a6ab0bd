"""RecurrentStack: recurrent layers with the interface of a transformer's Stack, so that all else is shared.

It takes embeddings of packed rows (and an encoder's states) and returns hidden states; each document starts
from its own first state. Encoders have two directions of half the width. A decoder starts from its source's
last states alone (`alignment: none`, the fixed context vector: Sutskever et al. 2014, Cho et al. 2014), or
attends to all source states at every step (additive: Bahdanau et al. 2015; multiplicative, with input
feeding: Luong et al. 2015; hard, one sampled state: Xu et al. 2015). Training is always by teacher forcing.
Cost on one core, D 256, two layers, forward and backward of 1,280 tokens: LSTM 75 ms, GRU 78, RNN 23; an
alignment goes step by step and takes about twice that. Shapes: B rows, T tokens, S source, D model, N
documents, P = B * T, L layers.
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
    """The source states of each document, as an alignment reads them."""

    states_NSD: Tensor
    keys_NSD: Tensor
    mask_NS: Tensor  # bool: which are source tokens

    def select(self, documents: Tensor | slice) -> "AlignmentSources":
        return AlignmentSources(self.states_NSD[documents], self.keys_NSD[documents], self.mask_NS[documents])


@dataclass(frozen=True)
class CellState:
    """The recurrent state of each document between two steps."""

    cells: Cells
    fed_ND: Tensor | None = None  # input feeding: the output of the last step
    sources: AlignmentSources | None = None

    def select(self, documents: Tensor | slice) -> "CellState":
        """The state of these documents, in this order."""
        cells = tuple(state[:, documents].contiguous() for state in self.cells)
        fed = None if self.fed_ND is None else self.fed_ND[documents]
        sources = None if self.sources is None else self.sources.select(documents)
        return CellState(cells, fed, sources)


@dataclass
class StateCache:
    """The counterpart of a key/value cache: one state a row, however long the text."""

    used: int = 0
    state: CellState | None = None

    def repeat(self, times: int) -> None:
        """Copy each row `times` times; the copies are adjacent."""
        if self.state is not None:
            first = self.state.cells[0]
            rows = torch.arange(first.shape[1], device=first.device)
            self.reorder(rows.repeat_interleave(times), 0)

    def reorder(self, rows_B: Tensor, start: int) -> None:
        """Select these rows, in this order."""
        assert self.state is not None
        self.state = self.state.select(rows_B)


class RecurrentStack(nn.Module):
    """Layers of one fused kernel, causal or bidirectional, with or without a source."""

    def __init__(self, config: ModelConfig, *, causal: bool, cross: bool = False) -> None:
        super().__init__()
        aligned = cross and config.alignment != "none"
        self.dropout = config.dropout
        self.input_feeding = config.alignment == "multiplicative"
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
        # The log-probabilities of the positions that the last forward of hard attention sampled.
        self.log_draws_BT: Tensor | None = None

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
        """Hidden states (B, T, D).

        With caches the tokens continue those that were read before, and `segments` covers both: (B, used +
        T).
        """
        cache = caches[0][0] if caches else StateCache()
        segments = _one_document(x_BTD) if segments_BT is None else segments_BT[:, cache.used :]
        documents, state = split_documents(segments), cache.state
        if state is None and memory_BSD is not None:
            if memory_segments_BS is None:
                memory_segments_BS = _one_document(memory_BSD)
            state = self._first_state(documents, split_documents(memory_segments_BS), memory_BSD)
        x_PD = documents.take(F.dropout(x_BTD, self.dropout, self.training))
        if self.align is None:
            y_PD, state = self._run(x_PD, documents.sizes_T, state)
        else:
            assert state is not None
            y_PD, state = self._step_by_step(x_PD, documents, state)
        if caches:
            cache.used += x_BTD.shape[1]
            cache.state = state.select(documents.at_row_ends())
        return F.dropout(documents.put(y_PD), self.dropout, self.training)

    def _run(self, x_PD: Tensor, sizes_T: Tensor, state: CellState | None) -> tuple[Tensor, CellState]:
        lstm = isinstance(self.cells, nn.LSTM)
        before: Cells | Tensor | None = None
        if state is not None:
            before = state.cells if lstm else state.cells[0]
        with _supported_kernels(x_PD):
            packed, after = self.cells(PackedSequence(x_PD, sizes_T), before)
        cells = after if lstm else (after,)
        return packed.data, CellState(cells) if state is None else replace(state, cells=cells)

    def _first_state(self, documents: Documents, source: Documents, memory_BSD: Tensor) -> CellState:
        """The first state of each document: a map of its source's last states in both directions."""
        assert self.bridge is not None
        same_row_NM = documents.row_N[:, None] == source.row_N
        same_NM = same_row_NM & (documents.segment_N[:, None] == source.segment_N)
        source_N, has_source_N = same_NM.int().argmax(1), same_NM.any(1)
        forward, backward = memory_BSD.flatten(0, 1).chunk(2, dim=-1)
        last_forward = forward[source.first_N + source.length_N - 1]
        last_MD = torch.cat([last_forward, backward[source.first_N]], dim=-1)
        first_ND = self.bridge(last_MD[source_N] * has_source_N[:, None]).tanh()
        cells = first_ND.unflatten(-1, (-1, self.cells.num_layers, self.cells.hidden_size))
        cells = cells.permute(1, 2, 0, 3).contiguous()
        if self.align is None:
            return CellState(tuple(cells))
        positions, is_token = source.table()
        states_NSD = memory_BSD.flatten(0, 1)[positions[source_N]]
        mask_NS = is_token[source_N] & has_source_N[:, None]
        sources = AlignmentSources(states_NSD, self.align.score.key(states_NSD), mask_NS)
        return CellState(tuple(cells), torch.zeros_like(cells[0, -1]), sources)

    def _step_by_step(self, x_PD: Tensor, documents: Documents, state: CellState) -> tuple[Tensor, CellState]:
        """Additive, hard: the state before a step is the query, and the context vector an input of the step.

        Multiplicative: the state after the step is the query, and the step's output an input of the next one.
        All: output = tanh(W [context, h]).
        """
        assert self.align is not None and self.combine is not None
        outputs: list[Tensor] = []
        log_draws: list[Tensor] = []
        for x_ND in x_PD.split(documents.sizes_T.tolist()):
            state = state.select(slice(len(x_ND)))  # the documents that are long enough for this step
            assert state.fed_ND is not None and state.sources is not None
            context, log_draw = state.fed_ND, None
            if not self.input_feeding:
                context, log_draw, _ = self.align(state.cells[0][-1], state.sources)
            h_ND, after = self._run(torch.cat([x_ND, context], dim=-1), torch.tensor([len(x_ND)]), state)
            if self.input_feeding:
                context, log_draw, _ = self.align(h_ND, state.sources)
            output_ND = self.combine(torch.cat([context, h_ND], dim=-1)).tanh()
            state = replace(after, fed_ND=output_ND)
            outputs.append(output_ND)
            if log_draw is not None:
                log_draws.append(log_draw)
        self.log_draws_BT = documents.put(torch.cat(log_draws)) if log_draws else None
        return torch.cat(outputs), state


class Alignment(nn.Module):
    """Attention to the source: the mean of its states under softmax(scores), or one sampled state."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.score = SCORES[config.alignment](config.dim)
        self.hard = config.alignment == "hard"

    def forward(self, h_ND: Tensor, sources: AlignmentSources) -> tuple[Tensor, Tensor | None, Tensor]:
        """The context vector (N, D), the log-probability of a sampled state (N,), and the weights (N, S).

        Hard attention samples from torch's global generator, which the training loop keys by (seed, micro) as
        for dropout; outside training it takes the most likely state.
        """
        scores_NS = self.score(h_ND, sources.keys_NSD).masked_fill(~sources.mask_NS, -1e4)
        weights_NS = scores_NS.softmax(-1) * sources.mask_NS  # a document without a source sees zeros
        if not self.hard:
            return torch.einsum("ns,nsd->nd", weights_NS, sources.states_NSD), None, weights_NS
        probabilities = scores_NS.detach().float().softmax(-1)
        log_draw_N = None
        if self.training:
            index_N1 = torch.multinomial(probabilities, 1)
            log_draw_N = scores_NS.log_softmax(-1).gather(1, index_N1)[:, 0]
        else:
            index_N1 = probabilities.argmax(-1, keepdim=True)
        index_N1D = index_N1[..., None].expand(-1, 1, h_ND.shape[-1])
        context_ND = sources.states_NSD.gather(1, index_N1D)[:, 0]
        return context_ND * sources.mask_NS[:, :1], log_draw_N, weights_NS


class Additive(nn.Module):
    """v tanh(W s + U h) (Bahdanau et al. 2015, A.1.2)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, dim, bias=False)
        self.v = nn.Linear(dim, 1, bias=False)

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


def _supported_kernels(x: Tensor) -> AbstractContextManager[None]:
    """Under autocast torch calls oneDNN's bf16 LSTM even on a CPU without one; this selects torch's own."""
    if x.is_cpu and torch.is_autocast_enabled("cpu") and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.backends.mkldnn.flags(enabled=False)
    return nullcontext()


def score_function(
    nll_BT: Tensor, log_draws_BT: Tensor, targets_BT: Tensor, segments_BT: Tensor | None
) -> Tensor:
    """Zero, with the gradient of the sum of losses by the sampled positions (REINFORCE, Williams 1992).

    It is that of each log-probability times the losses from its step on, minus a baseline: what as many
    targets cost on average in the other documents of the batch, which does not depend on the document's own
    samples.
    """
    documents = split_documents(torch.ones_like(targets_BT) if segments_BT is None else segments_BT)
    positions, is_token = documents.table()

    def from_each_step_on(x_BT: Tensor) -> Tensor:
        return (x_BT.flatten()[positions] * is_token).flip(1).cumsum(1).flip(1)

    losses = from_each_step_on(nll_BT)
    targets = from_each_step_on((targets_BT != IGNORE).to(nll_BT.dtype))
    other_losses = losses[:, 0].sum() - losses[:, :1]
    other_targets = targets[:, 0].sum() - targets[:, :1]
    baseline = other_losses / other_targets.clamp(min=1) * targets
    log_draws = log_draws_BT.flatten()[positions] * is_token
    term = (log_draws * (losses - baseline).detach()).sum()
    return term - term.detach()


def _one_document(x_BTD: Tensor) -> Tensor:
    return torch.ones(x_BTD.shape[:2], dtype=torch.int64, device=x_BTD.device)
