"""A short form of the soak test, tests/soak.py."""

import pytest
import soak

SHORT = {
    "kills": (10, 4),
    "corruption": (60,),
    "rows": (300,),
    "disk_full": (soak.STAGES[2:4],),
    "forgetting": (300,),
    "memory": (6,),
}


@pytest.mark.parametrize("name", SHORT)
def test_soak(name, tmp_path):
    if reason := soak.missing(name):
        pytest.skip(reason)
    counts = soak.PARTS[name][0](tmp_path, *SHORT[name])
    assert soak.kept(counts), counts
    assert counts.get("tried", 1) > 0 and counts.get("compared", 1) > 0
