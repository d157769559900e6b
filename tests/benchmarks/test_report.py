from __future__ import annotations

import pytest

from benchmarks.report import Settings, measure, table
from megatron_detour.errors import DetourError

pytestmark = pytest.mark.integration


def test_each_length_and_kind_of_work_has_a_row() -> None:
    rows = measure(Settings((100,)))
    assert [row[:2] for row in rows] == [("100", what) for what in ("report", "compare", "resume", "tensorboard")]
    assert all(float(row[4].removesuffix(" MiB")) > 1 for row in rows)
    assert table(rows).count("\n") == 5


def test_too_short_a_run_is_refused() -> None:
    with pytest.raises(DetourError, match="--steps: must be at least 100, not 5"):
        measure(Settings((1000, 5)))
