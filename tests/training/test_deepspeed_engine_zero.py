from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grappa_dist.distributed.collectives import Comm
from grappa_dist.training.deepspeed_engine import Engine
from grappa_dist.training.optim import Lars
from tests.processes import run_ranks
from tests.training.test_deepspeed_engine import batch, small_model

pytest.importorskip("deepspeed")
CPU = torch.device("cpu")
STEPS, SHARES = 6, {1: (7,), 2: (5, 2), 3: (3, 0, 4)}
Saved = dict[str, dict[str, Tensor]]


def learning(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def groups(model: nn.Module) -> list[list[nn.Parameter]]:
    """Two groups, one of which is clipped hard."""
    found = learning(model)
    return [[found["2.weight"], found["2.bias"]], [p for name, p in found.items() if name[0] in "34"]]


def step_alone(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, clip: float | None) -> float:
    optimizer.zero_grad()
    loss = model(batch(step)).square().sum() / 7
    loss.backward()
    for group in groups(model) if clip else ():
        torch.nn.utils.clip_grad_norm_(group, clip or 0.0)
    optimizer.step()
    return float(loss.detach())


def alone(clip: float | None) -> tuple[list[float], Saved]:
    """Whole batches, and nothing but torch."""
    model = small_model()
    optimizer = torch.optim.Adam(learning(model).values(), lr=1e-2, weight_decay=1e-3)
    losses = [step_alone(model, optimizer, step, clip) for step in range(STEPS)]
    return losses, saved_of(model, optimizer.state)


def saved_of(model: nn.Module, state: Any) -> Saved:
    return {name: {"": p.detach().clone(), **state[p]} for name, p in learning(model).items()}


def train(comm: Comm, stage: int, steps: range, saved: Saved | None, clip: float | None) -> tuple[list[float], Saved]:
    """Steps of a rank from a saved state on; the last backward pass of a step is in two parts."""
    model = small_model()
    optimizer = torch.optim.Adam(learning(model).values(), lr=1e-2, weight_decay=1e-3)
    if saved:
        for name, p in learning(model).items():
            p.data.copy_(saved[name][""])
            optimizer.state[p] = {key: value.clone() for key, value in saved[name].items() if key}
    engine = Engine(model, optimizer, comm, CPU, zero_stage=stage)
    losses = []
    for step in steps:
        share = batch(step).split(SHARES[comm.size])[comm.rank]
        total = torch.zeros(1)
        for i, part in enumerate((share[:2], share[2:])):
            loss = engine.forward(part).square().sum()
            engine.backward(loss * (comm.size / 7), last=i == 1)
            total += loss.detach()
        losses.append(float(comm.sum_(total)) / 7)
        if clip:
            engine.clip(groups(model), clip)
        engine.step(1e-2)
    found = saved_of(model, engine.state())
    engine.close()
    return losses, found


def norms_of_gradients(comm: Comm) -> list[tuple[list[float], bool]]:
    """At every stage, of two groups of parameters; and whether a step leaves the gradients as they were."""
    found = []
    for stage in (0, 1, 2):
        model = small_model()
        engine = Engine(model, torch.optim.Adam(learning(model).values()), comm, CPU, zero_stage=stage)
        engine.backward(engine.forward(batch(0).split(SHARES[comm.size])[comm.rank]).square().sum() * (comm.size / 7))
        before = {p: gradient.clone() for p, gradient in engine.gradients().items()}
        norms = engine.clip(groups(model), None).tolist()
        after = engine.gradients()
        found.append((norms, before.keys() == after.keys() and all(torch.equal(before[p], after[p]) for p in before)))
        engine.close()
    return found


@pytest.mark.parametrize("size", [1, 3])
def test_without_a_bound_gradients_are_measured_and_left_alone_at_any_stage(size: int) -> None:
    model = small_model()
    (model(batch(0)).square().sum() / 7).backward()
    expected = [float(torch.cat([p.grad.flatten() for p in g if p.grad is not None]).norm()) for g in groups(model)]
    for of_rank in run_ranks(norms_of_gradients, size):
        for norms, untouched in of_rank:
            assert norms == pytest.approx(expected, rel=1e-5)
            assert untouched


def close(found: Saved, expected: Saved) -> None:
    assert found.keys() == expected.keys()
    for name, tensors in found.items():
        assert tensors.keys() == expected[name].keys()
        for key, tensor in tensors.items():
            torch.testing.assert_close(tensor, expected[name][key], rtol=1e-4, atol=1e-6)  # sums in another order


def train_at_all_stages(
    comm: Comm, steps: range, saved: dict[int, Saved], clip: float
) -> dict[int, tuple[list[float], Saved]]:
    return {stage: train(comm, stage, steps, saved.get(stage), clip) for stage in (0, 1, 2)}


@pytest.mark.slow
def test_any_stage_is_the_bare_optimizer_on_the_whole_batch_through_two_ranks_then_one_then_three() -> None:
    clip = 0.05
    losses, expected = alone(clip)
    assert losses[2:] != alone(None)[0][2:]
    found: dict[int, list[float]] = {stage: [] for stage in (0, 1, 2)}
    saved: dict[int, Saved] = {}
    for size, first in ((2, 0), (1, 2), (3, 4)):
        ranks = run_ranks(train_at_all_stages, size, range(first, first + 2), saved, clip, timeout_s=400)
        for stage, (values, state) in ranks[0].items():
            found[stage] += values
            saved[stage] = state
            for other in ranks[1:]:
                assert other[stage][0] == values
                close(other[stage][1], state)
    for stage, values in found.items():
        torch.testing.assert_close(torch.tensor(values), torch.tensor(losses), rtol=1e-5, atol=1e-6)
        close(saved[stage], expected)


def goes_on_to_the_bit_in_parts(comm: Comm) -> list[tuple[bool, int, int]]:
    return [goes_on_in_parts(comm, stage) for stage in (1, 2)]


def goes_on_in_parts(comm: Comm, stage: int) -> tuple[bool, int, int]:
    straight = train(comm, stage, range(4), None, 0.05)
    halfway = train(comm, stage, range(2), None, 0.05)[1]
    resumed = train(comm, stage, range(2, 4), halfway, 0.05)
    same = [torch.equal(t, straight[1][name][key]) for name, ts in resumed[1].items() for key, t in ts.items()]
    own, held = parts_of_a_rank(comm, stage, halfway)
    return all(same) and resumed[0] == straight[0][2:], own, held


def parts_of_a_rank(comm: Comm, stage: int, saved: Saved) -> tuple[int, int]:
    """How many entries of all parameters this rank has the state of, and the size of its piece."""
    model = small_model()
    optimizer = torch.optim.Adam(learning(model).values())
    for name, p in learning(model).items():
        optimizer.state[p] = {key: value.clone() for key, value in saved[name].items() if key}
    engine = Engine(model, optimizer, comm, CPU, zero_stage=stage)
    (piece,) = optimizer.param_groups[0]["params"]
    optimizer.state[piece]["exp_avg"].fill_(comm.rank + 1)
    own = sum(int((known["exp_avg"] == comm.rank + 1).sum()) for known in engine.state().values())
    engine.close()
    return own, piece.numel()


def test_on_the_same_ranks_a_resumed_run_has_the_same_bits_and_ranks_hold_equal_parts() -> None:
    whole = sum(p.numel() for p in learning(small_model()).values())
    for found in zip(*run_ranks(goes_on_to_the_bit_in_parts, 2, timeout_s=400), strict=True):
        assert [same for same, _, _ in found] == [True, True]
        assert sum(own for _, own, _ in found) == whole
        assert whole / 2 <= found[0][2] == found[1][2] <= whole / 2 + 2  # pieces are padded


def goes_on_from_states_in_other_orders(comm: Comm) -> tuple[Saved, ...]:
    saved = train(comm, 1, range(2), None, None)[1]
    turned = {name: dict(reversed(tensors.items())) for name, tensors in saved.items()}
    return tuple(train(comm, 1, range(2, 4), way, None)[1] for way in (saved, turned if comm.rank else saved))


def test_ranks_gather_the_same_state_in_whatever_order_they_hold_it() -> None:
    for same, turned in run_ranks(goes_on_from_states_in_other_orders, 2, timeout_s=400):
        for name, tensors in same.items():
            assert all(torch.equal(tensor, turned[name][key]) for key, tensor in tensors.items()), name


def in_several_groups(comm: Comm, stage: int) -> tuple[Saved, Saved]:
    """The state after two steps of an optimizer with two groups; and what an engine has that begins with that state."""
    model, found = small_model(), []
    for steps in (range(2), range(0)):
        optimizer = torch.optim.Adam([{"params": group} for group in groups(model)], lr=1e-2)
        for p, known in found[-1].items() if found else ():
            optimizer.state[p] = {key: value.clone() for key, value in known.items()}
        engine = Engine(model, optimizer, comm, CPU, zero_stage=stage)
        for step in steps:
            share = batch(step).split(SHARES[comm.size])[comm.rank]
            engine.backward(engine.forward(share).square().sum() * (comm.size / 7))
            engine.step(1e-2)
        found.append({p: {key: value.clone() for key, value in known.items()} for p, known in engine.state().items()})
        engine.close()
    return saved_of(model, found[0]), saved_of(model, found[1])


@pytest.mark.parametrize("stage", [1, 2])
def test_an_optimizer_with_several_groups_has_its_state_before_the_first_step_as_after_the_last(stage: int) -> None:
    model = small_model()
    optimizer = torch.optim.Adam([{"params": group} for group in groups(model)], lr=1e-2)
    for step in range(2):
        step_alone(model, optimizer, step, None)
    for after, before in run_ranks(in_several_groups, 2, stage):
        close(after, saved_of(model, optimizer.state))
        for name, tensors in after.items():
            assert all(torch.equal(tensor, before[name][key]) for key, tensor in tensors.items()), name


def test_stage_three_is_refused_with_the_reason() -> None:
    model = small_model()
    with pytest.raises(ValueError, match="must be 0, 1 or 2; stage 3 would cut up the frozen backbone"):
        Engine(model, torch.optim.Adam(learning(model).values()), Comm(), CPU, zero_stage=3)


def test_an_optimizer_that_needs_whole_tensors_is_refused() -> None:
    model = small_model()
    with pytest.raises(ValueError, match="zero_stage=1: Lars needs whole tensors"):
        Engine(model, Lars(learning(model).values(), lr=0.1), Comm(), CPU, zero_stage=1)
