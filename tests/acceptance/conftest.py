"""One fleet for all tests of a module: starting it takes longer than most of them."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(scope="module")
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"use_uvloop": True}
