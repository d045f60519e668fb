"""Fixtures of the whole suite: threads, seeds, and the data folders that tests may use where they lie."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch


def _shared(name: str) -> Path:
    folder = Path(os.environ.get("COPYNCE_SHARED", Path(__file__).resolve().parents[2] / "shared")) / name
    if not folder.is_dir():
        pytest.skip(f"{name} is not here; set COPYNCE_SHARED to the folder that holds it")
    return folder


@pytest.fixture(scope="session")
def minidisc() -> Path:
    """The small benchmark of real pictures in DISC21's form."""
    return _shared("minidisc")


@pytest.fixture(scope="session")
def oracle() -> Path:
    """Outputs of the released code."""
    return _shared("oracle")


@pytest.fixture(scope="session")
def disc21_lists() -> Path:
    """The real id lists and ground truth of DISC21."""
    return _shared("disc21_lists")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    np.random.seed(0)  # noqa: NPY002 - libraries that draw from the global generator
    torch.manual_seed(0)
