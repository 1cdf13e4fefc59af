"""Fixtures that tests of several modules here use."""

import resource

import pytest


@pytest.fixture
def small_files():
    """No file can grow past 100 kB: writes fail as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
