"""`Curve`: a rate that depends on the size of the work, measured at a few sizes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Curve:
    """Work per second by the size of the work.

    The rate is interpolated between two sizes on logarithmic scales, and constant beyond them.
    More work never takes less time.

    Args:
        sizes: ascending: FLOPs or bytes.
        rates: per second.
    """

    sizes: tuple[float, ...]
    rates: tuple[float, ...]

    def __post_init__(self) -> None:
        sizes, rates = np.asarray(self.sizes, float), np.asarray(self.rates, float)
        if len(sizes) != len(rates) or not len(sizes):
            raise ValueError(f"a curve needs a rate per size, got {len(rates)} for {len(sizes)}")
        if not (np.all(np.isfinite(rates)) and np.all(rates > 0) and np.all(sizes > 0)):
            raise ValueError(f"a curve's sizes and rates must be positive: {self.to_list()}")
        if np.any(np.diff(sizes) <= 0) or np.any(
            np.diff(sizes / rates) < -1e-3 * sizes[1:] / rates[1:]
        ):
            raise ValueError(
                f"a curve's sizes must ascend, and so must its times: {self.to_list()}"
            )

    @staticmethod
    def of(points: Iterable[Sequence[Any]]) -> Curve:
        """A curve from pairs of size and rate.

        Raises:
            ValueError: they are not pairs of numbers, or not a curve.
        """
        try:
            pairs = [(float(size), float(rate)) for size, rate in points]
        except TypeError as error:
            raise ValueError(f"a curve is a list of [size, rate], not {points!r}") from error
        return Curve(tuple(size for size, _ in pairs), tuple(rate for _, rate in pairs))

    @staticmethod
    @lru_cache
    def constant(rate: float) -> Curve:
        """The same rate at any size."""
        return Curve((1.0,), (rate,))

    @staticmethod
    @lru_cache
    def saturating(rate: float, half: float) -> Curve:
        """A rate that work of size `half` reaches half of: every piece of work takes `half / rate`
        seconds beyond those at the full rate (filling the device, and its last wave)."""
        sizes = tuple(half * 10.0 ** (k / 3) for k in range(-9, 7))
        return Curve(sizes, tuple(rate * size / (size + half) for size in sizes))

    def scaled(self, factor: float) -> Curve:
        """All rates times a factor."""
        return Curve(self.sizes, tuple(factor * rate for rate in self.rates))

    @staticmethod
    def fit(sizes: Sequence[float], seconds: Sequence[float]) -> Curve:
        """A curve from measured times. Rates keep four digits.

        Noise can make less work take longer than more work; it then takes as long as the latter.
        """
        order = np.argsort(np.asarray(sizes, float))
        work = np.asarray(sizes, float)[order]
        # times of larger kernels are steadier
        times = np.minimum.accumulate(np.asarray(seconds, float)[order][::-1])[::-1]
        rates = tuple(float(f"{rate:.4g}") for rate in work / times)
        return Curve(tuple(float(size) for size in work), rates)

    @cached_property
    def _logs(self) -> tuple[np.ndarray, np.ndarray]:
        return np.log(np.asarray(self.sizes)), np.log(np.asarray(self.rates))

    def rate(self, size: np.ndarray | float) -> np.ndarray:
        """Work per second at a size."""
        if len(self.sizes) == 1:
            return np.asarray(self.rates[0])
        return np.exp(np.interp(np.log(np.maximum(size, self.sizes[0])), *self._logs))

    def us(self, size: np.ndarray | float) -> np.ndarray:
        """Microseconds for work of a size."""
        return 1e6 * np.asarray(size, float) / self.rate(size)

    def to_list(self) -> list[list[float]]:
        """Pairs of size and rate."""
        return [[size, rate] for size, rate in zip(self.sizes, self.rates, strict=True)]
