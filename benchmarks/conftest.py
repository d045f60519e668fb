from __future__ import annotations

import pytest


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Benchmarks run alone, in this process; tests share the cores."""
    return 0
