"""A pipeline's folder as `align run` leaves it."""

from pathlib import Path

import pytest
from report_pages import HOSTILE, whole


@pytest.fixture(scope="session")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete pipeline with hostile text everywhere; tests do not write to it."""
    return whole(tmp_path_factory.mktemp("runs") / "hostile", HOSTILE)


@pytest.fixture
def complete(tmp_path: Path) -> Path:
    """A complete pipeline."""
    return whole(tmp_path / "runs" / "demo")
