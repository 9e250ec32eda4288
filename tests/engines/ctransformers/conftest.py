"""A skip where ctransformers is not installed, and its one warning, which has a test of its own."""

from __future__ import annotations

import importlib.util
import warnings

import pytest

from kani_nb.engines.ctransformers.base import _warn_once


@pytest.fixture(autouse=True)
def ctransformers_is_installed() -> None:
    if importlib.util.find_spec("ctransformers") is None or importlib.util.find_spec("cpuinfo") is None:
        pytest.skip("ctransformers is not installed: pip install --no-deps ctransformers==0.2.27 py-cpuinfo")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        _warn_once()  # so that it has warned
