from __future__ import annotations

import pytest

from grappa_dist.bench.methods import WAYS, main


def test_every_way_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--rows", "300", "--dim", "8", "--num-labels", "30", "--iterations", "2", "--threads", "1"]
    assert main([*asked, "--probes", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith(name) for line in lines for name in {f"{way[0]}," for way in WAYS}) == len(WAYS) + 1
    assert any("+0.00%" in line for line in lines)
