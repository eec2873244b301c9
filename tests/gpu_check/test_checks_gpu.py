"""Every check on a real GPU; `make test-gpu` runs these, which are skipped, with the reason, where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from grappa_dist.gpu_check.checks import BF16, CHECKS, Check, Machine, NotHere
from grappa_dist.gpu_check.main import parser

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason=f"torch {torch.__version__} sees no GPU: nothing is tested"
    ),
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_a_check_passes_on_this_gpu(check: Check, tmp_path: Path) -> None:
    try:
        found = check.run(Machine(torch.device("cuda", 0), False, tmp_path))
    except NotHere as reason:
        pytest.skip(str(reason))
    assert found.wrong == ""


def test_the_command_asks_for_a_gpu_by_default() -> None:
    assert parser().parse_args(["--out", "x"]).device == "cuda"
    assert BF16 in CHECKS[0].arguments
