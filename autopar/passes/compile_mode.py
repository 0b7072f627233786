"""What `compile=` of `auto_engine` asks for."""

from __future__ import annotations

from dataclasses import dataclass

# Devices on which "auto" compiles. On CPUs, ATen's kernels are as fast and need no building.
_AUTO_COMPILES = ("cuda",)


@dataclass(frozen=True)
class CompileMode:
    """How graphs are compiled; true if they are.

    Args:
        inductor: Inductor builds and runs them.
        verified: what cannot be built, or gives other results than ATen at the first step, runs as
            ATen's operators.
    """

    inductor: bool = False
    verified: bool = False

    def __bool__(self) -> bool:
        return self.inductor

    @property
    def option(self) -> bool | str:
        """What asks for it."""
        return "auto" if self.verified else self.inductor

    @staticmethod
    def of(option: bool | str, device_type: str, *, lowered: bool = True) -> CompileMode:
        """
        Args:
            option: "auto", True, False or "cudagraphs".
            lowered: graphs are lowered; only those are compiled.

        Raises:
            ValueError: it is another one, or "cudagraphs", which is not supported yet.
        """
        if not isinstance(option, bool) and option not in ("auto", "cudagraphs"):
            raise ValueError(f"compile must be True, False, 'auto' or 'cudagraphs', got {option!r}")
        if option is False:
            return CompileMode()
        if option == "auto":
            compiles = lowered and device_type in _AUTO_COMPILES
            return CompileMode(inductor=compiles, verified=compiles)
        if not lowered:
            raise ValueError(
                f"compile={option!r} compiles the lowered graphs; leave lower=False out"
            )
        if option == "cudagraphs":
            why = (
                "is not supported yet: a CUDA graph writes over the results and gradients of the "
                "step before, and holds memory that no plan counts"
                if device_type == "cuda"
                else f"is for GPUs, and the cluster's devices are {device_type}s"
            )
            raise ValueError(f"compile='cudagraphs' {why}; pass compile=True, which runs Inductor")
        return CompileMode(inductor=True)
