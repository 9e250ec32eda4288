"""Caches of a test's own, and a Hub on loopback."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sources.hub_stand_in import HubStandIn


@pytest.fixture(autouse=True)
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test sees this machine's caches, logins or proxies."""
    for name in (
        *("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH"),
        *("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "KANI_NB_SMOLLM2"),
        *("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"),
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("KANI_NB_CACHE", str(tmp_path / "own"))
    # Nothing listens there: a test that forgets its Hub fails at once, on every machine alike.
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    return tmp_path


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    """An empty Hub, asked by everything in this test."""
    stand_in = HubStandIn()
    monkeypatch.setenv("HF_ENDPOINT", stand_in.url)
    monkeypatch.setattr("kani_nb.engines.hub_download.RETRY_DELAYS_S", (0.01, 0.01, 0.01))
    yield stand_in
    stand_in.close()
