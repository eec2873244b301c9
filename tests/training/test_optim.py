from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from grappa_dist.training.optim import Lars, adapted_gradient
from tests import reference

SETTINGS = {"lr": 0.5, "momentum": 0.9, "eta": 1e-3, "weight_decay": 1e-3}


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tiny_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)).double()


def train(model: nn.Module, optimizer: Lars, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        model(values(5, 4, seed=step)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("shape", [(1, 1), (4, 3), (2, 3, 2), (5,), ()])
def test_steps_equal_the_reference(shape: tuple[int, ...]) -> None:
    param = nn.Parameter(values(*shape))
    optimizer = Lars([param], **SETTINGS)
    expected, buffer = param.detach().clone(), torch.zeros_like(param)
    for step in range(4):
        grad = values(*shape, seed=step + 1)
        param.grad = grad.clone()
        optimizer.step()
        expected, buffer = reference.lars_step(expected, grad, buffer, **SETTINGS)
        torch.testing.assert_close(param.detach(), expected)


def test_a_matrix_moves_by_its_own_norm_whatever_the_scale_of_its_gradient() -> None:
    param, grad = values(4, 3), values(4, 3, seed=1)
    small, large = (adapted_gradient(param, scale * grad, eta=1e-3, weight_decay=0.0) for scale in (1e-6, 1e6))
    torch.testing.assert_close(small, large)
    torch.testing.assert_close(small.norm(), 1e-3 * param.norm())


def test_a_zero_norm_leaves_the_gradient_unscaled() -> None:
    zeros, grad = torch.zeros(2, 3), torch.ones(2, 3)
    assert torch.equal(adapted_gradient(zeros, grad, eta=1e-3, weight_decay=1e-3), grad)
    assert torch.equal(adapted_gradient(grad, zeros, eta=1e-3, weight_decay=0.0), zeros)
    assert torch.equal(adapted_gradient(zeros, zeros, eta=1e-3, weight_decay=1e-3), zeros)


def test_biases_and_norms_are_neither_adapted_nor_decayed() -> None:
    bias, grad = values(3), values(3, seed=1)
    assert torch.equal(adapted_gradient(bias, grad, eta=1e-3, weight_decay=1e-3), grad)


def test_a_step_changes_no_gradient_and_skips_parameters_without_one() -> None:
    used, unused = nn.Parameter(values(2, 2)), nn.Parameter(values(2, 2))
    used.grad = values(2, 2, seed=1)
    optimizer = Lars([used, unused], **SETTINGS)
    assert optimizer.step(lambda: 7.0) == 7.0
    assert torch.equal(used.grad, values(2, 2, seed=1))
    assert torch.equal(unused, values(2, 2))
    assert unused not in optimizer.state


@pytest.mark.parametrize("stop", [0, 1, 4])
def test_resumed_training_is_training_that_never_stopped(stop: int) -> None:
    whole = tiny_model()
    train(whole, Lars(whole.parameters(), **SETTINGS), range(6))
    first = tiny_model()
    stopped = Lars(first.parameters(), **SETTINGS)
    train(first, stopped, range(stop))
    resumed = tiny_model()
    resumed.load_state_dict(first.state_dict())
    optimizer = Lars(resumed.parameters(), lr=123.0)  # the settings come back with the state
    optimizer.load_state_dict(copy.deepcopy(stopped.state_dict()))
    train(resumed, optimizer, range(stop, 6))
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_groups_keep_their_own_settings() -> None:
    a, b = nn.Parameter(values(2, 3)), nn.Parameter(values(2, 3))
    optimizer = Lars([{"params": [a]}, {"params": [b], "lr": 0.0}], **SETTINGS)
    a.grad, b.grad = values(2, 3, seed=1), values(2, 3, seed=1)
    optimizer.step()
    assert not torch.equal(a, values(2, 3))
    assert torch.equal(b, values(2, 3))


def test_flattened_parameters_are_refused() -> None:
    model = tiny_model()
    optimizer = Lars(model.parameters(), **SETTINGS)
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in model.parameters()]))
    flat.grad = torch.ones_like(flat)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(ValueError, match="ZeRO stage 0"):
        optimizer.step()


def test_a_copied_optimizer_steps_like_the_original() -> None:
    model = tiny_model()
    optimizer = Lars(model.parameters(), **SETTINGS)
    train(model, optimizer, range(2))
    model_copy, optimizer_copy = copy.deepcopy((model, optimizer))
    train(model, optimizer, range(2, 4))
    train(model_copy, optimizer_copy, range(2, 4))
    for a, b in zip(model.parameters(), model_copy.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["lr", "momentum", "eta", "weight_decay"])
def test_negative_settings_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 0, got -1"):
        Lars([nn.Parameter(torch.ones(1))], **{**SETTINGS, name: -1})


def test_tensors_side_by_side_in_one_move_as_if_they_were_apart() -> None:
    apart = [nn.Parameter(values(2, 3, seed=i) * 10**i) for i in range(3)]
    together = nn.Parameter(torch.cat([p.detach() for p in apart]))
    ours, baseline = Lars([{"params": [together], "sets": 3}], **SETTINGS), Lars(apart, **SETTINGS)
    for step in range(3):
        grads = [values(2, 3, seed=10 * step + i) for i in range(3)]
        together.grad = torch.cat(grads)
        for param, grad in zip(apart, grads, strict=True):
            param.grad = grad
        ours.step()
        baseline.step()
        assert torch.equal(together.detach(), torch.cat([p.detach() for p in apart]))


def test_what_is_called_a_bias_is_one_whatever_its_dimensions() -> None:
    matrix, vectors = nn.Parameter(values(2, 3)), [nn.Parameter(row.clone()) for row in values(2, 3)]
    ours, baseline = Lars([{"params": [matrix], "biases": True}], **SETTINGS), Lars(vectors, **SETTINGS)
    for step in range(2):
        matrix.grad = values(2, 3, seed=step + 1)
        for vector, grad in zip(vectors, matrix.grad, strict=True):
            vector.grad = grad.clone()
        ours.step()
        baseline.step()
    assert torch.equal(matrix.detach(), torch.stack([v.detach() for v in vectors]))
