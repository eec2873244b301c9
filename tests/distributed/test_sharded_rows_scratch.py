from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from grappa_dist.distributed.sharded_rows import scratch


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32, torch.float64])
def test_scratch_is_a_writable_tensor_of_zeros(dtype: torch.dtype) -> None:
    tensor = scratch((3, 5), dtype)
    assert torch.equal(tensor, torch.zeros(3, 5, dtype=dtype))
    tensor[1] = 7
    assert tensor.sum() == 35


def test_empty_scratch_needs_no_file() -> None:
    assert scratch((0, 5), torch.float32).shape == (0, 5)


def test_scratch_leaves_no_file_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    tensor = scratch((1000,), torch.int64)
    assert list(tmp_path.iterdir()) == []
    assert int(tensor.sum()) == 0


def test_a_full_disk_is_an_error_that_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=rf"{tmp_path}: 8,000 bytes of scratch: No space left .*TMPDIR names another"):
        scratch((1000,), torch.int64)
