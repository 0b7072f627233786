"""Published schemes of tensor parallelism: the meshes that they are for, and what is split where.

A product is Y[m, n] = X[m, k] W[k, n], with rows m (the batch) and features k and n. A scheme says
over which mesh axes the dims of X, W and Y are split where they are stored, and which dims the
product itself splits. The difference is what is communicated: an axis that splits X or W at rest
and not in the product is gathered, and one that splits k leaves a sum, which is reduce-scattered.

    preset   mesh     X at rest    product      W at rest      Y at rest
    tp1d     P        -,   -       n0           k-,   n0       -,   n0       column
                      -,   k0      k0           k0,   n-       -,   -        row
    tp2d     q q      m0,  k1      m0, n1       k0,   n1       m0,  n1       SUMMA
    tp2.5d   d q q    m01, k2      m01, n2      k1,   n2       m01, n2
    tp3d     q q q    m12, k0      m1, k0, n2   k01,  n2       m10, n2
                      m10, k2      m1, k2, n0   k2,   n01      m12, n0

`m01` is split over axis 0, and inside of that over axis 1. With two lines, products alternate.
Column and row are of Shoeybi et al. 2019; the others of Xu et al. 2021 (2D), Wang et al. 2021
(2.5D) and Bian et al. 2021 (3D). docs/tensor_parallelism.md has what they communicate and hold, and
`autopar/planner/presets.py` writes a scheme as constraints.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isqrt, prod

from autopar.errors import ConstraintError
from autopar.units import mesh_text

Axes = tuple[int, ...]


@dataclass(frozen=True)
class SplitProduct:
    """How a product is split, and how its weight is stored: mesh axes per dim."""

    m: Axes
    k: Axes
    n: Axes
    weight_k: Axes
    weight_n: Axes


@dataclass(frozen=True)
class Scheme:
    """A scheme of tensor parallelism.

    Args:
        title: its name in sentences.
        mesh: the meshes that it is for, in words.
        shapes: the meshes of a number of ranks.
        activations: rows and features of the values that an even and an odd product takes.
        products: an even and an odd product.
    """

    title: str
    mesh: str
    shapes: Callable[[int], list[tuple[int, ...]]]
    activations: tuple[tuple[Axes, Axes], tuple[Axes, Axes]]
    products: tuple[SplitProduct, SplitProduct]


def _root(ranks: int, power: int) -> int:
    """The q > 1 with q ** power == ranks, or 0."""
    return next((q for q in range(2, ranks + 1) if q**power == ranks), 0)


def _with_depth(ranks: int) -> list[tuple[int, ...]]:
    sizes = range(2, isqrt(ranks // 2) + 1)
    return [(ranks // q**2, q, q) for q in sizes if ranks % q**2 == 0]


_SUMMA = SplitProduct((0,), (), (1,), (0,), (1,))
_TESSERACT = SplitProduct((0, 1), (), (2,), (1,), (2,))

SCHEMES: Mapping[str, Scheme] = {
    "tp1d": Scheme(
        "1D tensor parallelism",
        "one axis",
        lambda ranks: [(ranks,)] if ranks > 1 else [],
        (((), ()), ((), (0,))),
        (SplitProduct((), (), (0,), (), (0,)), SplitProduct((), (0,), (), (0,), ())),
    ),
    "tp2d": Scheme(
        "2D tensor parallelism",
        "two equal axes",
        lambda ranks: [(q, q)] if (q := _root(ranks, 2)) else [],
        (((0,), (1,)), ((0,), (1,))),
        (_SUMMA, _SUMMA),
    ),
    "tp2.5d": Scheme(
        "2.5D tensor parallelism",
        "three axes, of which the last two are equal",
        _with_depth,
        (((0, 1), (2,)), ((0, 1), (2,))),
        (_TESSERACT, _TESSERACT),
    ),
    "tp3d": Scheme(
        "3D tensor parallelism",
        "three equal axes",
        lambda ranks: [(q, q, q)] if (q := _root(ranks, 3)) else [],
        (((1, 2), (0,)), ((1, 0), (2,))),
        (
            SplitProduct((1,), (0,), (2,), (0, 1), (2,)),
            SplitProduct((1,), (2,), (0,), (2,), (0, 1)),
        ),
    ),
}


def check_scheme(name: str) -> None:
    """Raise ConstraintError if there is no such scheme."""
    if name not in SCHEMES:
        raise ConstraintError(f"there is no preset {name!r}; presets are {', '.join(SCHEMES)}")


def mesh_axes(name: str, mesh: Sequence[int]) -> Axes:
    """The mesh axes that play the parts of a scheme's axes; axes of size 1 play none.

    Raises:
        ConstraintError: there is no such scheme, or it is not for this mesh.
    """
    check_scheme(name)
    scheme = SCHEMES[name]
    axes = tuple(axis for axis, size in enumerate(mesh) if size > 1)
    sizes, ranks = tuple(mesh[axis] for axis in axes), prod(mesh)
    if sizes in scheme.shapes(ranks):
        return axes
    if ranks == 1:
        raise ConstraintError(f"preset {name} splits a model over devices, and the mesh has one")
    fitting = [mesh_text(shape) for shape in scheme.shapes(ranks)]
    if fitting:
        remedy = f"its {ranks} ranks can be {' or '.join(fitting)}"
    else:
        counts = [n for n in range(ranks - 1, 1, -1) if scheme.shapes(n)][:1]
        counts += [n for n in range(ranks + 1, 8 * ranks + 1) if scheme.shapes(n)][:1]
        near = [mesh_text(shape) for n in counts for shape in scheme.shapes(n)]
        remedy = f"{ranks} ranks have no such mesh; the nearest are {' and '.join(near)}"
    raise ConstraintError(
        f"preset {name} ({scheme.title}) is for a mesh of {scheme.mesh}, and mesh "
        f"{mesh_text(mesh)} is not one; {remedy}"
    )
