"""A chain of blocks in stages whose largest cost is as small as possible."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np


def partition(
    blocks: int, stages: int, costs: Callable[[int], np.ndarray]
) -> tuple[tuple[int, ...], float]:
    """Where stages begin, with the number of blocks at the end; and the largest cost.

        best[s, b] = min over a < b of max(best[s - 1, a], cost of stage s with blocks a to b - 1)

    Args:
        costs: by stage, an array as those of `Spans`; infinite where the stage may not be.
    """
    best = np.full(blocks + 1, np.inf)
    best[0] = 0.0
    lengths = np.zeros((stages, blocks + 1), int)
    for stage in range(stages):
        of_stage = costs(stage)
        before, best = best, np.full(blocks + 1, np.inf)
        for length in range(1, of_stage.shape[1] + 1):
            firsts = blocks + 1 - length
            found = np.maximum(before[:firsts], of_stage[:firsts, length - 1])
            better = found < best[length:]
            best[length:][better] = found[better]
            lengths[stage, length:][better] = length
    borders = [blocks]
    if np.isfinite(best[blocks]):
        for stage in range(stages - 1, -1, -1):
            borders.append(borders[-1] - int(lengths[stage, borders[-1]]))
    return tuple(reversed(borders)), float(best[blocks])


class Spans:
    """Costs of all stages that come into question, without what passes between stages: arrays by
    first block and number of blocks less 1.

    Args:
        sums: by field of `Block`, its sums over the first blocks of the model. `saved_bytes` is
            what recomputing saves.
    """

    def __init__(self, sums: Mapping[str, np.ndarray], stages: int) -> None:
        self._sums = sums
        self._found: dict[str, np.ndarray] = {}
        us = sums["forward_us"] + sums["input_us"] + sums["weight_us"]
        blocks = len(us) - 1
        # A stage of several times the mean is in no good pipeline.
        most_us = 3 * max(us[-1] / stages, np.diff(us).max())
        longest = np.searchsorted(us, us[:-1] + most_us, "right") - 1 - np.arange(blocks)
        lengths = 1 + np.arange(min(int(longest.max()), blocks - stages + 1))
        self._first = np.arange(blocks)[:, None]
        # There are fewer blocks than that at the end; `partition` does not look there.
        self._end = np.minimum(self._first + lengths, blocks)

    def of(self, name: str) -> np.ndarray:
        """The sum over the blocks of a stage."""
        if name not in self._found:
            self._found[name] = self._sums[name][self._end] - self._sums[name][self._first]
        return self._found[name]

    def before(self, name: str) -> np.ndarray:
        """The sum over the blocks before the stage."""
        return self._sums[name][self._first]

    def peak_bytes(self, held: float, weights: float, recompute: str | None) -> np.ndarray:
        """Of stages that hold so many microbatches for the backward and for W, with as much
        recomputed as may be."""
        nbytes = self.of("state_bytes") + held * self.of("held_bytes")
        if weights:
            nbytes = nbytes + weights * self.of("weight_bytes")
        return nbytes if recompute == "none" else nbytes - held * self.of("saved_bytes")

    def recompute_us(
        self, held: float, weights: float, recompute: str | None, budget_bytes: float
    ) -> np.ndarray:
        """Of what has to be recomputed to fit the budget; infinite if it does not fit."""
        if recompute == "all":
            us = self.of("recompute_us").copy()
        else:
            excess = self.peak_bytes(held, weights, "none") - budget_bytes
            if excess.max() <= 0:
                return np.zeros(excess.shape)
            first, end = np.broadcast_arrays(self._first, self._end)
            over = excess > 0
            saved, times = self._sums["saved_bytes"], self._sums["recompute_us"]
            until = np.searchsorted(saved, saved[first[over]] + excess[over] / held)
            us = np.zeros(excess.shape)
            us[over] = times[np.minimum(until, end[over])] - times[first[over]]
        us[self.peak_bytes(held, weights, recompute) > budget_bytes] = np.inf
        return us
