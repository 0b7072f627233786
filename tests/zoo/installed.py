"""The promised families whose library is installed, as parameters of a test."""

import importlib.util

import pytest

from tests.zoo import hf, timm_rows

INSTALLED = [
    pytest.param(family, id=f"{family.library}-{family.name.replace(' ', '-')}")
    for library, families in (("transformers", hf.FAMILIES), ("timm", timm_rows.FAMILIES))
    if importlib.util.find_spec(library) is not None
    for family in families
]
