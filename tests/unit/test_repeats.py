"""Copies of operators: blocks by name, loops by their bodies."""

from autopar.ir.repeats import fold_loops, pattern, places


def folded(text):
    return [place for place, _ in fold_loops(text)]


def test_copies_of_a_block_share_a_name():
    assert pattern("h.3.attn.0") == "h.*.attn.*"
    assert pattern("layer3.attn") == "layer3.attn"


def test_turns_of_a_loop_share_their_places():
    assert folded("xy" + "abcd" * 3 + "z") == [0, 1, *[2, 3, 4, 5] * 3, 14]
    # a loop that ends in the middle of its body
    assert folded("abcde" * 4 + "ab") == [0, 1, 2, 3, 4] * 4 + [0, 1]


def test_what_is_no_loop_stays_apart():
    assert folded("abcdabcd") == list(range(8))  # two iterations
    assert folded("aaaa") == [0, 1, 2, 3]
    assert folded("abab") == [0, 1, 2, 3]
    assert folded("") == []


def test_loops_of_different_blocks_are_one():
    sequence = [(f"layers.{i}.mixer", op) for i in range(2) for op in "p" + "abcd" * 3]
    keys = places([*sequence, ("head", "p")])
    assert keys[-1] is None
    assert keys[:13] == keys[13:26]
    assert keys[1] == keys[5] == keys[9] != keys[2]
    assert places([("loop", op) for op in "abcd" * 3])[0] is not None
