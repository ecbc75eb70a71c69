"""Marks of tests that need an optional package; they are skipped where it is not installed.

python -m pytest -m "gpu and not needs_dali and not needs_deepspeed" tests/gpu
"""

from __future__ import annotations

import pytest

from common.packages import is_installed

PACKAGES = {"needs_dali": "nvidia.dali", "needs_deepspeed": "deepspeed"}


def pytest_configure(config):
    for mark, package in PACKAGES.items():
        config.addinivalue_line("markers", f"{mark}: needs the package {package}")


def pytest_runtest_setup(item):
    for mark, package in PACKAGES.items():
        if item.get_closest_marker(mark) and not is_installed(package):
            pytest.skip(f"{package} is not installed")
