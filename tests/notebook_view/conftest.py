"""A clock and a screen for what is displayed."""

import pytest

from tests.notebook_view.screen import Clock, Screen


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def screen(clock):
    return Screen(clock)
