from __future__ import annotations

import socket
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from grappa_dist.distributed.collectives import Comm, process_group, raise_together
from tests.processes import free_address, run_ranks

SIZES = {2: (0, 4), 3: (3, 0, 1)}


def own_rows(comm: Comm, dtype: torch.dtype = torch.float32) -> Tensor:
    """This rank's share of 0, 1, 2, ...: uneven, and one rank has none."""
    sizes = SIZES[comm.size]
    first = sum(sizes[: comm.rank])
    return torch.arange(2 * first, 2 * (first + sizes[comm.rank])).view(-1, 2).to(dtype)


def travel(comm: Comm) -> dict[str, Any]:
    rows = own_rows(comm)
    found: dict[str, Any] = {}
    found["gathered"] = comm.gather(rows)
    found["strided"] = comm.gather(rows.T.contiguous().T)
    for dtype in (torch.bool, torch.uint8, torch.int64, torch.bfloat16, torch.float64):
        found[str(dtype)] = comm.gather(own_rows(comm, dtype))
    ring = [rows]
    for _ in range(comm.size):
        ring.append(comm.shift(ring[-1]))
    found["ring"] = ring
    found["strided ring"] = comm.shift(rows.T.contiguous().T)
    found["sum"] = comm.sum_(torch.tensor([2**40 + comm.rank, 1]))
    found["largest"] = comm.max_(torch.tensor([-torch.inf if comm.rank else 2.0, float(comm.rank), -torch.inf]))
    found["sum of none"] = comm.sum_(torch.zeros(0, 3))
    shapes = [(source, 3 - comm.rank) for source in range(comm.size)]  # rank r sends r rows, of 3 - s columns to rank s
    own = torch.arange(3 * comm.rank).view(comm.rank, 3) + 10 * comm.rank
    found["exchanged"] = comm.exchange([own[:, : 3 - target] for target in range(comm.size)], shapes)
    for source in range(comm.size):
        found[f"from {source}"] = comm.broadcast(torch.full((2,), float(comm.rank)), source)
    comm.barrier()
    return found


@pytest.mark.parametrize("size", [2, 3])
def test_rows_travel_whole_and_in_order_between_uneven_ranks(size: int) -> None:
    shares = [own_rows(Comm(rank, size)) for rank in range(size)]
    for rank, found in enumerate(run_ranks(travel, size)):
        for name in ("gathered", "strided"):
            assert all(torch.equal(a, b) for a, b in zip(found[name], shares, strict=True))
        for dtype in (torch.bool, torch.uint8, torch.int64, torch.bfloat16, torch.float64):
            assert all(torch.equal(a, b.to(dtype)) for a, b in zip(found[str(dtype)], shares, strict=True))
        assert len(found["ring"]) == size + 1
        for step, rows in enumerate(found["ring"]):
            assert torch.equal(rows, shares[(rank - step) % size])
        assert torch.equal(found["strided ring"], shares[(rank - 1) % size])
        assert found["sum"].tolist() == [size * 2**40 + sum(range(size)), size]
        assert found["largest"].tolist() == [2, size - 1, -torch.inf]
        assert found["sum of none"].shape == (0, 3)
        for source, part in enumerate(found["exchanged"]):
            assert torch.equal(part, (torch.arange(3 * source).view(source, 3) + 10 * source)[:, : 3 - rank])
        for source in range(size):
            assert found[f"from {source}"].tolist() == [source, source]


def gathered_storage(comm: Comm, sizes: tuple[int, ...]) -> tuple[list[Tensor], int]:
    own = torch.full((sizes[comm.rank], 2), comm.rank, dtype=torch.int64)
    parts = comm.gather(own)
    assert all(torch.equal(part, known) for part, known in zip(parts, comm.gather(own, sizes), strict=True))
    held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in parts}
    return [part.clone() for part in parts], sum(held.values())


@pytest.mark.parametrize("sizes", [(1000, 0, 0), (0, 3, 1000), (10, 9, 10), (0, 0, 0)])
def test_at_most_twice_what_there_is_travels_however_uneven_the_ranks(sizes: tuple[int, ...]) -> None:
    for parts, held in run_ranks(gathered_storage, 3, sizes):
        assert held <= 2 * 16 * sum(sizes)
        for rank, (part, size) in enumerate(zip(parts, sizes, strict=True)):
            assert torch.equal(part, torch.full((size, 2), rank))


def share_of_a_loss(comm: Comm, values: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    own = values[comm.rank].requires_grad_()
    total = comm.allsum(own.square().sum(0))
    loss = total.square().sum()  # the same on every rank
    loss.backward()
    assert own.grad is not None
    return total.detach(), loss.detach(), own.grad


@pytest.mark.parametrize("sizes", [(2, 0), (1, 3), (0, 2, 1)])
def test_the_gradient_of_allsum_is_as_many_times_the_true_one_as_there_are_ranks(sizes: tuple[int, ...]) -> None:
    values = torch.randn(sum(sizes), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = values.clone().requires_grad_()
    total = whole.square().sum(0)
    total.square().sum().backward()
    assert whole.grad is not None
    results = run_ranks(share_of_a_loss, len(sizes), list(values.split(list(sizes))))
    for found, loss, _ in results:
        torch.testing.assert_close(found, total.detach())
        torch.testing.assert_close(loss, total.detach().square().sum())
    torch.testing.assert_close(torch.cat([grad for *_, grad in results]), len(sizes) * whole.grad)


def test_a_world_of_one_needs_no_process_group_and_copies_nothing() -> None:
    comm, rows = Comm(), torch.ones(3, 2, requires_grad=True)
    assert comm.allsum(rows) is rows
    assert comm.gather(rows)[0] is rows
    assert comm.shift(rows) is rows
    assert comm.sum_(rows) is rows
    assert comm.max_(rows) is rows
    assert comm.broadcast(rows, 0) is rows
    assert comm.exchange([rows], [(3, 2)])[0] is rows
    comm.barrier()


def test_a_port_that_is_taken_is_an_error_of_the_connection_that_names_it() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with (
            pytest.raises(ConnectionError, match=rf"^no process group at {address}: .*in use"),
            process_group(0, 1, address),
        ):
            pass


@pytest.mark.parametrize("device", [None, torch.device("cpu"), torch.device("cuda", 0)])
def test_the_group_of_a_gpu_is_nccl_s_and_is_bound_to_it_and_others_are_gloo_s(
    device: torch.device | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, init = list[object](), dist.init_process_group

    def noted(backend: str, *, device_id: object, **named: Any) -> None:
        given.append((backend, device_id))
        init("gloo", **named)

    monkeypatch.setattr(dist, "init_process_group", noted)
    with process_group(0, 1, free_address(), device=device):
        assert given == [("nccl", device) if device is not None and device.type == "cuda" else ("gloo", None)]


def complain(comm: Comm, problems: list[str]) -> str:
    try:
        raise_together(comm, problems[comm.rank])
    except ValueError as error:
        return str(error)
    return "fine"


def test_a_problem_of_one_rank_is_raised_on_all() -> None:
    assert run_ranks(complain, 3, ["", "row 7 of x: naïve", "other"]) == ["row 7 of x: naïve"] * 3
    assert run_ranks(complain, 2, ["", ""]) == ["fine"] * 2
