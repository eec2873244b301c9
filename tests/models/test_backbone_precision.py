from __future__ import annotations

import pytest
import torch

from grappa_dist.models.backbone import forward_precision


@pytest.mark.parametrize(("kind", "bf16", "enabled"), [("cuda", None, True), ("cpu", None, False), ("cpu", True, True)])
def test_products_are_in_bfloat16_on_gpus_and_where_asked_for(
    monkeypatch: pytest.MonkeyPatch, kind: str, bf16: bool | None, enabled: bool
) -> None:
    entered: list[tuple[str, torch.dtype]] = []
    autocast = torch.autocast

    def note(device_type: str, dtype: torch.dtype) -> torch.autocast:
        entered.append((device_type, dtype))
        return autocast("cpu", dtype)

    monkeypatch.setattr(torch, "autocast", note)
    with forward_precision(torch.device(kind), bf16=bf16):
        found = torch.nn.Linear(3, 2)(torch.ones(1, 3)).dtype
    assert entered == [(kind, torch.bfloat16)] * enabled
    assert found == (torch.bfloat16 if enabled else torch.float32)


def test_nothing_is_entered_where_nothing_is_computed() -> None:
    with forward_precision(torch.device("meta")):
        assert torch.nn.Linear(3, 2, device="meta")(torch.ones(1, 3, device="meta")).dtype == torch.float32
