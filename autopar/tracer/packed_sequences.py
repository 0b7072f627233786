"""Packed sequences, captured as padded ones.

`pack_padded_sequence` drops what lies behind the end of each sequence, so its shapes are the values
of the lengths. A capture keeps the padded rows beside the lengths instead, and a recurrent layer
carries the state of a sequence on unchanged from its end. The results are the same, and one program
serves all lengths.

Torch's Python code around the layers handles two stand-ins: `Rows` in the place of the packed data,
`BatchSizes` in that of the batch sizes. Whoever asks them for anything else is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.utils import rnn

from autopar.errors import CaptureError
from autopar.tracer.source import current_line

# Functions that treat each row by itself, of whatever trailing dims.
_ROW_BY_ROW = frozenset(
    ("dropout", "embedding", "gelu", "layer_norm", "linear", "relu", "sigmoid", "tanh")
)


def refusal() -> CaptureError:
    """What is said of packed sequences that cannot be captured."""
    line = current_line()
    return CaptureError(
        f"{line}: `{line.text}` uses packed sequences in a way that depends on the lengths of a "
        "batch, so that each batch would be another program. Inside of the model, a sequence may "
        "be packed (pack_padded_sequence), pass through layers such as nn.LSTM, nn.GRU and "
        "dropout, and be padded (pad_packed_sequence, best with total_length=). Pass the padded "
        "batch and the lengths to the model, and select by lengths what else is to be computed"
    )


class StandIn:
    """Refuses what it does not know."""

    def __getattr__(self, name: str) -> Any:
        raise refusal()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise refusal()


def _refuse(*_: Any) -> Any:
    raise refusal()


for _operator in (
    "add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "pow", "neg", "matmul",
    "lt", "le", "gt", "ge", "len", "iter", "getitem", "setitem",
):  # fmt: skip
    setattr(StandIn, f"__{_operator}__", _refuse)


class Rows(StandIn):
    """In the place of packed data `[sum of lengths, *]`.

    Args:
        padded: [longest, batch, *], of which rows behind the ends mean nothing.
        lengths: [batch], int64.
    """

    def __init__(self, padded: torch.Tensor, lengths: torch.Tensor) -> None:
        self.padded, self.lengths = padded, lengths
        self.dtype, self.device = padded.dtype, padded.device

    def dim(self) -> int:
        return self.padded.ndim - 1

    def size(self, dim: int) -> int:
        if dim != -1:
            raise refusal()
        return self.padded.shape[-1]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rows, *rest = args or (None,)
        if getattr(func, "__name__", "") not in _ROW_BY_ROW or not isinstance(rows, Rows):
            raise refusal()
        return Rows(func(rows.padded, *rest, **(kwargs or {})), rows.lengths)


class BatchSizes(StandIn):
    """In the place of the batch sizes: how many sequences reach each position."""

    device = torch.device("cpu")

    def __init__(self, batch: int, longest: _Longest) -> None:
        self.batch, self.longest = batch, longest

    def __getitem__(self, position: int) -> int:
        if position != 0:
            raise refusal()
        return self.batch

    def size(self, dim: int) -> int:
        """The length of the longest sequence, which `pad_packed_sequence` passes on as it is."""
        asked_by_torch = sys._getframe(1).f_code.co_filename == rnn.__file__
        return self.longest if asked_by_torch else self.longest.number()


class _Longest(int):
    """The length of the longest sequence, not known yet; as an integer, its bound."""

    _lengths: torch.Tensor
    _ask: Callable[[torch.Tensor], Any]

    @staticmethod
    def of(lengths: torch.Tensor, bound: int, ask: Callable[[torch.Tensor], Any]) -> _Longest:
        """Of sequences in a padded batch of length `bound`.

        Args:
            ask: gives the value of a tensor, and makes a guard.
        """
        longest = _Longest(bound)
        longest._lengths, longest._ask = lengths, ask
        return longest

    def number(self) -> int:
        return int(self._ask(self._lengths.max()))

    def __gt__(self, total: int) -> bool:
        return total < int(self) and bool(self._ask(self._lengths.max() > total))


def packed(
    ask: Callable[[torch.Tensor], Any], x: torch.Tensor, lengths: torch.Tensor, batch_first: bool
) -> tuple[Rows, BatchSizes]:
    """`_pack_padded_sequence`.

    Args:
        ask: gives the value of a tensor, and makes a guard.
        x: [longest, batch, *], with `batch_first` [batch, longest, *].

    Raises:
        CaptureError: lengths that torch refuses.
    """
    padded = x.transpose(0, 1) if batch_first else x
    within = (lengths > 0) & (lengths <= padded.shape[0])
    if not ask(within.all() & (lengths[1:] <= lengths[:-1]).all()):
        raise CaptureError(
            f"{current_line()}: lengths of packed sequences must be 1 to {padded.shape[0]}, and "
            "decrease where enforce_sorted=True"
        )
    longest = _Longest.of(lengths, padded.shape[0], ask)
    return Rows(padded, lengths), BatchSizes(padded.shape[1], longest)


def padded(
    rows: Any, sizes: Any, batch_first: bool, padding_value: float, total: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """`_pad_packed_sequence`: [total, batch, *] and the lengths.

    Args:
        total: a number of positions, or the longest length.
    """
    if not isinstance(rows, Rows):
        raise refusal()
    x, count = rows.padded, total.number() if isinstance(total, _Longest) else total
    missing = max(0, count - x.shape[0])
    x = torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) if missing else x[:count]
    ended = _ended(count, rows.lengths.to(x.device))
    x = x.masked_fill(ended.reshape(*ended.shape, *[1] * (x.ndim - 2)), padding_value)
    return x.transpose(0, 1) if batch_first else x, rows.lengths


def _ended(positions: int, lengths: torch.Tensor) -> torch.Tensor:
    """[positions, batch]: whether a sequence has ended before a position."""
    return torch.arange(positions, device=lengths.device)[:, None] >= lengths


def recurrent(
    kind: str,
    rows: Rows,
    state: Any,
    weights: Sequence[torch.Tensor],
    biases: bool,
    layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
) -> tuple[Any, ...]:
    """`lstm`, `gru`, `rnn_tanh` and `rnn_relu` of packed sequences, as torch defines them.

    Args:
        state: [layers * directions, batch, hidden]; of an LSTM a pair, of hidden and of cells.
        weights: of each layer and direction: input, state, both biases, projection.

    Returns:
        the packed results of the last layer, and the final states.
    """  # fmt: skip
    states = [state] if isinstance(state, torch.Tensor) else list(state)
    directions = 2 if bidirectional else 1
    each = len(weights) // (layers * directions)
    ended = _ended(rows.padded.shape[0], rows.lengths.to(rows.device))[..., None]
    x, finals = rows.padded, []
    for layer in range(layers):
        if layer and dropout:
            x = F.dropout(x, dropout, training)
        results = []
        for k in range(layer * directions, (layer + 1) * directions):
            own_weights: list[Any] = list(weights[each * k : each * (k + 1)])
            if not biases:
                own_weights[2:2] = [None, None]
            first = tuple(s[k] for s in states)
            result, final = _scan(
                _CELLS[kind], x, ended, first, own_weights, reverse=bool(k % directions)
            )
            results.append(result)
            finals.append(final)
        x = torch.cat(results, -1)
    return (Rows(x, rows.lengths), *(torch.stack(parts) for parts in zip(*finals, strict=True)))


def _scan(
    cell: Any,
    x: torch.Tensor,
    ended: torch.Tensor,
    state: tuple[torch.Tensor, ...],
    weights: Sequence[Any],
    *,
    reverse: bool,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """One direction of a layer: its hidden states [longest, batch, hidden], and the final state.

    Args:
        ended: [longest, batch, 1]; there, a state stays what it is.
    """  # fmt: skip
    of_input, of_state, input_bias, state_bias, *projection = weights
    gates = F.linear(x, of_input, input_bias).unbind()
    results = []
    for t in reversed(range(len(gates))) if reverse else range(len(gates)):
        new = cell(gates[t], F.linear(state[0], of_state, state_bias), *state)
        if projection:
            new = (F.linear(new[0], projection[0]), *new[1:])
        state = tuple(torch.where(ended[t], s, n) for s, n in zip(state, new, strict=True))
        results.append(state[0])
    return torch.stack(results[::-1] if reverse else results), state


def _lstm(a: torch.Tensor, b: torch.Tensor, h: torch.Tensor, c: torch.Tensor) -> Any:
    i, f, g, o = (a + b).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru(a: torch.Tensor, b: torch.Tensor, h: torch.Tensor) -> Any:
    (ra, za, na), (rb, zb, nb) = a.chunk(3, -1), b.chunk(3, -1)
    z, n = (za + zb).sigmoid(), (na + (ra + rb).sigmoid() * nb).tanh()
    return (n + z * (h - n),)


_CELLS: dict[str, Callable[..., Any]] = {
    "lstm": _lstm,
    "gru": _gru,
    "rnn_tanh": lambda a, b, h: ((a + b).tanh(),),
    "rnn_relu": lambda a, b, h: ((a + b).relu(),),
}
