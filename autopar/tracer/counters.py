"""Whether an instruction reads a number only to count on: `self.calls += 1`.

By bytecode, so that no source is needed. Names of instructions are those of Python 3.11 to 3.14.
"""

from __future__ import annotations

import dis
from itertools import islice
from types import CodeType

_CONSTANTS = ("LOAD_CONST", "LOAD_SMALL_INT")
_LOCALS = ("LOAD_FAST", "LOAD_FAST_BORROW")
_COUNTS = ("+", "-", "+=", "-=")


def only_counts(code: CodeType, instruction: int, name: str) -> bool:
    """Whether an attribute that is read there goes, plus or minus a constant, into itself alone.

    Args:
        instruction: offset of the one that reads `name`.
    """
    instructions = iter(dis.get_instructions(code))
    owner = None
    for read in instructions:
        if read.offset == instruction:
            break
        owner = read
    following = [(i.opname, i.argval, i.argrepr) for i in islice(instructions, 5)]
    if len(following) < 4 or owner is None:
        return False
    (constant, number, _), (_, _, sign), (turn, place, _), *rest = following
    if constant not in _CONSTANTS or type(number) not in (int, float) or sign not in _COUNTS:
        return False
    # `owner.name += 1` has the owner below the sum; `self.name = self.name + 1` loads it again
    augmented = owner.opname == "COPY" and (turn, place) == ("SWAP", 2)
    again = owner.opname in _LOCALS and turn in _LOCALS and place == owner.argval
    store, stored, _ = rest[0]
    return (augmented or again) and (store, stored) == ("STORE_ATTR", name)
