"""Layouts of pipelines as text: ours, and Megatron's."""

import re

import pytest

from autopar.errors import PlanError
from autopar.schedule.pipeline.layout import layout_text, parse_layout

NAMES = ["embed", *(f"h.{layer}" for layer in range(12)), "norm", "head"]
LAYOUT = "embed,h.0-h.3|h.4-h.7|h.8-h.11,norm,head"


def kind_of(name: str) -> str:
    return {"embed": "E", "norm": "L", "head": "L"}.get(name, "t")


def test_round_trip():
    assert layout_text((5, 9), NAMES) == LAYOUT
    assert parse_layout(LAYOUT, NAMES) == (5, 9)
    assert parse_layout(LAYOUT.replace(",", ", ").replace("|", " |\n"), NAMES) == (5, 9)
    assert parse_layout(LAYOUT, NAMES, kind_of) == (5, 9)
    for cuts in ((), (1,), (14,), (1, 2, 13), tuple(range(1, 15))):
        assert parse_layout(layout_text(cuts, NAMES), NAMES) == cuts


def test_ranges_are_of_one_list_and_of_whole_layers_or_parts():
    names = ["enc.0.attn", "enc.0.mlp", "enc.1.attn", "dec.0.attn", "dec.0.mlp", "pre-norm", "7"]
    text = "enc.0.attn-enc.0.mlp|enc.1.attn,dec.0.attn-dec.0.mlp,pre-norm,7"
    assert layout_text((2,), names) == text
    assert parse_layout(text, names) == (2,)
    assert parse_layout("enc.0.attn-dec.0.attn|dec.0.mlp-pre-norm,7", names) == (4,)


@pytest.mark.parametrize(
    "text, message",
    [
        ("embed|h.0-h.11,norm", "head is in no stage; add each to one"),
        ("embed,h.5-h.11|norm,head", "h.0, h.1, h.2, h.3, h.4 are in no stage"),
        ("embed,h.6-h.11|norm,head", "h.0, h.1, h.2, h.3, h.4 and 1 more are in no stage"),
        ("embed,h.0-h.3|h.3-h.11,norm,head", "h.3 is in more than one stage, or twice in one"),
        ("embed,h.4-h.11|h.0-h.3,norm,head", "h.0 follows h.11, but runs before it"),
        ("embed||h.0-h.11,norm,head", "stage 1 of 3 is empty; give it a block or remove its |"),
        ("embed,x.0|h.0", "the model has no block 'x.0' where it can be cut; its blocks are embed"),
        ("embed,h.0-h.12|norm", "no block 'h.12'"),
        ("h.3-h.0|embed", "h.3-h.0 runs backwards; h.0 is before h.3 in the model"),
        ("", "stage 0 of 1 is empty"),
    ],
)
def test_wrong_layouts(text: str, message: str):
    with pytest.raises(PlanError, match=re.escape(message)):
        parse_layout(text, NAMES)


@pytest.mark.parametrize(
    "text, cuts",
    [
        ("Et*4|t*4|t*4L", (5, 9)),
        ("Et*3|(tt|)*4,tL", (4, 6, 8, 10, 12)),
        ("E|(t|)*12L", tuple(range(1, 14))),
        ("Ett,(t|t)*5|L", (4, 6, 8, 10, 12, 13)),
        ("E((t|)*2t)*4|L", (2, 3, 5, 6, 8, 9, 11, 12, 13)),
    ],
)
def test_megatron_layouts(text: str, cuts: tuple[int, ...]):
    assert parse_layout(text, NAMES, kind_of) == cuts


def test_megatron_layout_of_deepseek_v3():
    names = ["embed", *(f"h.{layer}" for layer in range(61)), "mtp", "loss"]
    cuts = parse_layout(
        "Et*3|(tt|)*29,m|L", names, lambda n: {"embed": "E", "mtp": "m", "loss": "L"}.get(n, "t")
    )
    assert len(cuts) == 31
    assert cuts == (4, *range(6, 63, 2), 63)


def test_blocks_without_a_letter_belong_to_the_one_before():
    names = ["mask", "embed", "rotary", "h.0", "h.1", "dropout", "head"]
    kinds = {"embed": "E", "h.0": "t", "h.1": "t", "head": "L"}
    assert parse_layout("E|t|tL", names, lambda name: kinds.get(name, "")) == (3, 4)


@pytest.mark.parametrize(
    "text, message",
    [
        ("Et*13|L", "the model is at norm, of kind L where the layout has t; the kinds of the"),
        ("Et*11|L", "the model is at h.11, of kind t where the layout has L; the kinds of the model"
                    " are Et*12L"),
        ("t*12|L", "the model is at embed, of kind E where the layout has t"),
        ("Et*12LL", "the model is at its end where the layout has L"),
        ("Et*12", "norm, head are in no stage"),
        ("Et*12||L", "stage 1 of 3 is empty"),
        ("Et**2|L", "* is not where it may be; repetitions are t*3 or (tt|)*3"),
        ("(Et", "( is not where it may be"),
    ],
)  # fmt: skip
def test_wrong_megatron_layouts(text: str, message: str):
    with pytest.raises(PlanError, match=re.escape(message)):
        parse_layout(text, NAMES, kind_of)
