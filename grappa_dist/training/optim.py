"""LARS: SGD with momentum, each tensor's step in proportion to its own norm.

Source: You, Gitman, Ginsburg, "Large Batch Training of Convolutional Networks", 2017, arXiv 1708.03888; in the form
that Barlow Twins trains with (Zbontar et al. 2021, arXiv 2103.03230): the trust ratio sees the gradient with its decay,
momentum gathers ratio times gradient, the learning rate comes last; biases and norms are left out of decay and ratio.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def adapted_gradient(param: Tensor, grad: Tensor, *, eta: float, weight_decay: float) -> Tensor:
    """The decayed gradient times eta * |param| / |decayed gradient|, same shape; the factor is 1 where a norm is zero.

    A parameter of at most one dimension (bias, norm) has its gradient returned as it is.
    """
    if param.ndim <= 1:
        return grad
    grad = grad + weight_decay * param
    param_norm, grad_norm = torch.linalg.vector_norm(param), torch.linalg.vector_norm(grad)
    ratio = eta * param_norm / grad_norm
    return grad * torch.where((param_norm > 0) & (grad_norm > 0), ratio, torch.ones_like(ratio))


class Lars(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling. A trust ratio belongs to a whole tensor: flattened ones are refused.

    A group of parameters may say `sets`: so many tensors lie in each of its parameters, one after the other along the
    first dimension, and each has its own ratio; and `biases`: its parameters are biases, whatever their dimensions.
    """

    def __init__(
        self, params: Any, lr: float, *, momentum: float = 0.9, eta: float = 1e-3, weight_decay: float = 0.0
    ) -> None:
        settings = {"lr": lr, "momentum": momentum, "eta": eta, "weight_decay": weight_decay}
        for name, value in settings.items():
            if not value >= 0:
                raise ValueError(f"Lars: {name} must be at least 0, got {value}")
        self._shapes: list[list[torch.Size]] = []  # of every group, as the model has them
        super().__init__(params, {**settings, "sets": 1, "biases": False})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self._shapes.append([param.shape for param in self.param_groups[-1]["params"]])

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_shapes" not in self.__dict__:  # a copy: the base class copies its own fields only
            self._shapes = [[param.shape for param in group["params"]] for group in self.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group, shapes in zip(self.param_groups, self._shapes, strict=True):
            found = [param.shape for param in group["params"]]
            if found != shapes:  # ZeRO swaps in flat pieces: all would pass for biases, and the ratio would be lost
                raise ValueError(f"Lars: parameters must keep their shapes {shapes}, found {found}: use ZeRO stage 0")
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, group)
        return loss

    def _update(self, param: Tensor, group: dict[str, Any]) -> None:
        assert param.grad is not None
        state = self.state[param]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(param)
        state["momentum"].mul_(group["momentum"]).add_(_gradient(param, param.grad, group))
        param.add_(state["momentum"], alpha=-group["lr"])


def _gradient(param: Tensor, grad: Tensor, group: dict[str, Any]) -> Tensor:
    """The gradient as momentum gathers it, same shape."""
    if group["biases"]:
        return grad
    eta, decay, sets = group["eta"], group["weight_decay"], group["sets"]
    if sets == 1:
        return adapted_gradient(param, grad, eta=eta, weight_decay=decay)
    parts = zip(param.chunk(sets), grad.chunk(sets), strict=True)
    return torch.cat([adapted_gradient(p, g, eta=eta, weight_decay=decay) for p, g in parts])
