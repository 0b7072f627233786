"""`Device`: what one device computes, moves and holds. A new device is one row of `DEVICES`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from autopar.cluster.curve import Curve
from autopar.cluster.data import check_number, curves_from

GiB = 2**30

# Kinds of arithmetic in libraries, and of elementwise work that takes longer than moving the bytes.
LIBRARIES = ("matmul", "unaligned", "convolution", "depthwise", "attention")
EXTRAS = ("function", "random", "reduction", "variance", "index", "strided", "scalar")


@dataclass(frozen=True)
class Device:
    """Speed and memory of one device.

    `autopar cluster` measures `flops_by_size`, `bytes_by_size` and `extra_ns`. Without them,
    arithmetic runs at `peak_flops` and bytes move at `bandwidth`, whatever the size.

    Args:
        name: for reports.
        kind: torch device type, `"cuda"` or `"cpu"`.
        peak_flops: achievable FLOP/s by dtype name (`"float32"`, `"bfloat16"`, ...).
        memory_bytes: device memory.
        bandwidth: device memory bandwidth, bytes/s.
        launch_us: overhead of one operator, microseconds. A GPU computes while the host launches
            ahead; there it is the least time that an operator takes.
        flops_by_size: FLOP/s of one kernel by its FLOPs. A key is a library and a dtype, such as
            `"matmul.float32"` or `"convolution.float32"`; `"unaligned"` stands for matrix products
            with rows that do not begin at multiples of 16 bytes.
        bytes_by_size: bytes/s of one kernel by its bytes; keys are `"read"` and `"write"`.
        extra_ns: nanoseconds per element beyond reading and writing it, by kind of work: an
            elementary `function`, a `random` draw, a `reduction`, the `variance` across rows, a
            look-up by `index`, a `strided` read, or a `scalar` instruction (a comparison).
        rated_flops: peaks of the vendor's data sheet, which MFU is a share of, where they differ
            from `peak_flops`.
        overlaps: whether collectives and copies run beside compute. If None, only on GPUs: on a
            CPU they take the cores that compute, and device memory is host memory.
        gap_us: idle time between two kernels of a GPU, see `Software`.
        source: where the numbers come from.
        error_percent: mean absolute error of predicted steps against measured ones, where some
            were published for this device.
    """

    name: str
    kind: str
    peak_flops: Mapping[str, float]
    memory_bytes: float
    bandwidth: float
    launch_us: float
    flops_by_size: Mapping[str, Curve] = field(default_factory=dict)
    bytes_by_size: Mapping[str, Curve] = field(default_factory=dict)
    extra_ns: Mapping[str, float] = field(default_factory=dict)
    rated_flops: Mapping[str, float] = field(default_factory=dict)
    overlaps: bool | None = None
    gap_us: float = 0.0
    source: str = ""
    error_percent: float | None = None

    def __post_init__(self) -> None:
        prefix = f"device {self.name}: "
        for key, rate in self.peak_flops.items():
            check_number(f"{prefix}peak_flops[{key}]", rate)
        if "float32" not in self.peak_flops:
            raise ValueError(f"{prefix}peak_flops lacks float32, the rate of what is not listed")
        for key, rate in self.rated_flops.items():
            check_number(f"{prefix}rated_flops[{key}]", rate)
        check_number(f"{prefix}memory_bytes", self.memory_bytes)
        check_number(f"{prefix}bandwidth", self.bandwidth)
        check_number(f"{prefix}launch_us", self.launch_us, zero=True)
        check_number(f"{prefix}gap_us", self.gap_us, zero=True)
        if self.error_percent is not None:
            check_number(f"{prefix}error_percent", self.error_percent)
        for key, ns in self.extra_ns.items():
            check_number(f"{prefix}extra_ns[{key}]", ns, zero=True)
        libraries = {key.split(".")[0] for key in self.flops_by_size}
        for name, keys, known in (
            ("flops_by_size", libraries, LIBRARIES),
            ("bytes_by_size", self.bytes_by_size, ("read", "write")),
            ("extra_ns", self.extra_ns, EXTRAS),
        ):
            if unknown := sorted(set(keys) - set(known)):
                raise ValueError(f"{prefix}{name} has {unknown}; it takes {', '.join(known)}")

    @property
    def runs_beside(self) -> bool:
        """Whether collectives and copies run beside compute."""
        return self.kind != "cpu" if self.overlaps is None else self.overlaps

    def flops_per_s(self, dtype: str) -> float:
        """Peak for a dtype; a dtype that is not listed runs at the float32 rate."""
        return self.peak_flops.get(dtype, self.peak_flops["float32"])

    def rated_flops_per_s(self, dtype: str) -> float:
        """As the vendor rates it."""
        return self.rated_flops.get(dtype) or self.flops_per_s(dtype)

    @property
    def measured(self) -> bool:
        """Whether more is known than the peaks."""
        return bool(self.flops_by_size or self.bytes_by_size or self.extra_ns)

    def flops_curve(self, library: str, dtype: str) -> Curve:
        """FLOP/s by FLOPs of a kernel. What was not measured runs as fast as matrix products."""
        curves = self.flops_by_size
        curve = curves.get(f"{library}.{dtype}") or curves.get(f"matmul.{dtype}")
        return curve or Curve.constant(self.flops_per_s(dtype))

    def bytes_curve(self, direction: str) -> Curve:
        """Bytes/s by bytes that a kernel moves in a direction, `"read"` or `"write"`."""
        return self.bytes_by_size.get(direction) or Curve.constant(self.bandwidth)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Device:
        """Inverse of `data.plain`.

        Raises:
            TypeError: a key is missing or unknown.
            ValueError: a number or a curve is not legal.
        """
        curves = {
            key: curves_from(f"device {data.get('name')}: {key}", data[key])
            for key in ("flops_by_size", "bytes_by_size")
            if key in data
        }
        return Device(**{**data, **curves})


@dataclass(frozen=True)
class Achieved:
    """What kernels reach of a data sheet's peaks.

    Args:
        matmul: share of the peak by large products.
        matmul_half: FLOPs of a product that reaches half of that.
        unaligned: share by products whose rows do not begin at multiples of 16 bytes.
        attention: share by fused attention, over its forward and its backward.
        bandwidth: share of the memory's bandwidth.
        bandwidth_half: bytes of a kernel that reaches half of that.
        float8, mxfp8: share of twice the peak by large products in float8, with one scale per
            tensor or per 32 elements; 0 if they are not known.
        nvfp4: share of the vendor's peak in 4 bits by those in 4 bits; 0 if it is not known.
    """

    matmul: float
    matmul_half: float
    unaligned: float
    attention: float
    bandwidth: float
    bandwidth_half: float
    float8: float = 0.0
    mxfp8: float = 0.0
    nvfp4: float = 0.0


# Fitted to half of the rows of vTrain, MPT-llm-foundry and Korthikanti; the bandwidth is that of
# large copies. Attention is that of FlashAttention-2, and no row tests it: MPT has Triton's
# first one, at 0.57 of this (`software.py`).
A100 = Achieved(0.77, 5.9e9, 0.287, 0.55, 0.82, 2e6)
# Fitted to half of MPT-llm-foundry's rows on H100, float8 to half of Megatron-Bridge's, with the
# A100's bandwidths.
H100 = Achieved(0.603, 7.5e9, 0.2, 0.32, 0.82, 2e6, 0.59)
# Set by half of torchtitan's bf16 rows, with the H100's other numbers.
H100_500W = Achieved(0.54, 7.5e9, 0.2, 0.215, 0.82, 2e6, 0.5)
# Shares in 8 and 4 bits are fitted to half of Megatron-Bridge's rows on GB300, the others assumed.
BLACKWELL = Achieved(0.7, 1.5e10, 0.2, 0.28, 0.82, 5e6, 0.65, 0.62, 0.49)

_LAUNCH_US = 2.0  # the least time of a kernel, whose launch is hidden


def _gpu(
    name: str, gib: float, bandwidth: float, fp32: float, tf: float, fp64: float,
    achieved: Achieved | None = None, *, fp4: float = 0.0, source: str = "data sheet",
    error: float | None = None,
) -> Device:  # fmt: skip
    """A GPU at what its kernels achieve; if that is not known, at 70% of the vendor's peaks, which
    large matrix products reach in practice, and 80% of the bandwidth."""
    peak = {"float64": fp64, "float32": fp32, "bfloat16": tf, "float16": tf}
    rated = {k: 1e12 * v for k, v in peak.items()}
    rates = {k: 0.7 * v for k, v in rated.items()}
    if achieved is None:
        return Device(
            name, "cuda", rates, gib * GiB, 0.8 * bandwidth, 4.0, rated_flops=rated, source=source
        )
    curves: dict[str, Curve] = {}
    for dtype in ("bfloat16", "float16"):
        for library in ("matmul", "unaligned", "attention"):
            rate = getattr(achieved, library) * rated[dtype]
            curves[f"{library}.{dtype}"] = Curve.saturating(rate, achieved.matmul_half)
        rates[dtype] = achieved.matmul * rated[dtype]
    for short, times in (("float8", 2.0), ("mxfp8", 2.0), ("nvfp4", fp4 / tf)):
        if share := times * getattr(achieved, short):
            rates[short] = share * rated["bfloat16"]
            curves[f"matmul.{short}"] = Curve.saturating(rates[short], times * achieved.matmul_half)
    moves = Curve.saturating(achieved.bandwidth * bandwidth, achieved.bandwidth_half)
    return Device(
        name, "cuda", rates, gib * GiB, achieved.bandwidth * bandwidth, _LAUNCH_US, curves,
        {"read": moves, "write": moves}, rated_flops=rated, source=source, error_percent=error,
    )  # fmt: skip


# From public data sheets, for dense matrices: memory in GiB, bandwidth in B/s, TFLOP/s in fp32
# (without TF32), bf16, fp64. `benchmarks.published_steps` tests the rows that have an error: it is
# the mean of the half that nothing was fitted to.
DEVICES: dict[str, Device] = {
    d.name.lower(): d
    for d in (
        _gpu(
            "A100-40G", 40, 1.555e12, 19.5, 312, 19.5, A100, error=5.0,
            source="data sheet; shares of it fitted to vTrain and MPT-llm-foundry",
        ),
        _gpu(
            "A100-80G", 80, 2.039e12, 19.5, 312, 19.5, A100, error=5.0,
            source="data sheet; shares of it fitted to vTrain and MPT-llm-foundry",
        ),
        _gpu(
            "H100", 80, 3.35e12, 67, 989, 67, H100, error=7.0,
            source="data sheet; shares fitted to MPT-llm-foundry, in float8 to Megatron-Bridge",
        ),
        _gpu(
            "H100-96G-500W", 96, 2.4e12, 67, 989, 67, H100_500W, error=8.0,
            source="the memory and limit that torchtitan states; shares set by its bf16 rows",
        ),
        _gpu(
            "H200", 141, 4.8e12, 67, 989, 67, H100,
            source="data sheet; shares as of the H100, not tested",
        ),
        *(
            _gpu(
                name, gib, 8.0e12, 80, tf, fp64, BLACKWELL, fp4=fp4, error=error,
                source=f"data sheet; shares in 8 and 4 bits {of}, the others assumed",
            )
            for name, gib, tf, fp64, fp4, error, of in (
                ("B200", 180, 2250, 40, 9000, None, "as of the GB300"),
                ("GB200", 186, 2500, 40, 10000, None, "as of the GB300"),
                ("B300", 268, 2250, 1.3, 13500, None, "as of the GB300"),
                ("GB300", 278, 2500, 1.3, 15000, 6.0, "fitted to Megatron-Bridge"),
            )
        ),
        _gpu("L4", 24, 0.3e12, 30.3, 121, 0.47),
        _gpu("4090", 24, 1.008e12, 82.6, 165, 1.29),
        # One core of a server CPU, as a Gloo rank with one thread sees it.
        Device(
            "cpu", "cpu", {"float32": 5e10, "float64": 2.5e10}, 6 * GiB, 8e9, 5.0, source="assumed"
        ),
    )
}  # fmt: skip


def device(name: str) -> Device:
    """Look a device up in the table.

    Raises:
        ValueError: no such device; the message names the nearest.
    """
    if name.lower() not in DEVICES:
        near = get_close_matches(name.lower(), DEVICES, n=1, cutoff=0.3)
        hint = f"; did you mean {DEVICES[near[0]].name}?" if near else "."
        known = ", ".join(d.name for d in DEVICES.values())
        raise ValueError(f"unknown device {name!r}{hint} Known: {known}")
    return DEVICES[name.lower()]
