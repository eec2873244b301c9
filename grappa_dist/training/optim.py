"""The optimizers of training: LARS, Adam, and Adam row by row.

LARS is SGD with momentum, each tensor's step in proportion to its own norm (You, Gitman, Ginsburg, "Large Batch
Training of Convolutional Networks", 2017, arXiv 1708.03888), in the form that Barlow Twins trains with (Zbontar et al.
2021, arXiv 2103.03230): the trust ratio is of the gradient with its decay, momentum gathers ratio times gradient, the
learning rate comes last; biases and norms are left out of decay and ratio.

Under the engine, `Lars` or `adam` trains all parameters. `adam_step` trains classifiers outside the engine: every row
counts its own steps, so that rows may be left out of a step.

Shapes: C rows, D channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8  # torch.optim.Adam's


class Lars(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling. A trust ratio belongs to a whole tensor: flattened ones are refused.

    A group of parameters may have `sets`: that many tensors lie in each of its parameters, one after the other along
    the first dimension, and each has its own ratio; and `biases`: its parameters are biases, whatever their dimensions.
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
            if found != shapes:  # ZeRO puts in flat pieces: all would pass for biases, and the ratio would be lost
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


def adam(parameters: Sequence[nn.Parameter], learning_rate: float, weight_decay: float = 0.0) -> torch.optim.Adam:
    """Adam with weight decay as L2 added to the gradient: the paper's, not AdamW. Betas and eps are torch's.

    On a GPU one kernel updates all parameters.
    """
    fused = is_fused(parameters[0].device) or None  # None: torch's default on a CPU
    return torch.optim.Adam(parameters, lr=learning_rate, weight_decay=weight_decay, fused=fused)


def is_fused(device: torch.device) -> bool:
    return device.type == "cuda"


@dataclass(frozen=True)
class RowState:
    """Parameters and their Adam state, row by row."""

    rows: Tensor  # (C, D)
    mean: Tensor  # (C, D) running mean of the gradient
    square: Tensor  # (C, D) and of its square
    steps: Tensor  # (C,) int32, steps that each row has taken part in

    @classmethod
    def zeros(cls, num_rows: int, dim: int, device: torch.device) -> RowState:
        rows, mean, square = (torch.zeros(num_rows, dim, device=device) for _ in range(3))
        return cls(rows, mean, square, torch.zeros(num_rows, dtype=torch.int32, device=device))

    def at(self, where: slice | Tensor) -> RowState:
        """Some rows: a view for a slice, a copy for indices."""
        return RowState(self.rows[where], self.mean[where], self.square[where], self.steps[where])

    def put(self, where: Tensor, part: RowState) -> None:
        """Writes back what `at(where)` returned, after it was changed."""
        for name, tensor in part.tensors().items():
            self.tensors()[name][where] = tensor

    def tensors(self) -> dict[str, Tensor]:
        return {"rows": self.rows, "mean": self.mean, "square": self.square, "steps": self.steps}


def adam_step(state: RowState, gradient: Tensor, *, learning_rate: float, weight_decay: float) -> None:
    """One step of all rows of `state`, in place: torch.optim.Adam's, with weight decay as L2 in the gradient.

    `gradient` (C, D) is overwritten.
    """
    steps = state.steps.add_(1).double()[:, None]  # 1 - 0.999 in float32 is off by 6e-5
    root, rate = (1 - BETA2**steps).sqrt().to(gradient), (learning_rate / (1 - BETA1**steps)).to(gradient)  # (C, 1)
    gradient.add_(state.rows, alpha=weight_decay)
    state.mean.lerp_(gradient, 1 - BETA1)
    state.square.mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)
    size = torch.sqrt(state.square, out=gradient).div_(root).add_(EPS)
    update = torch.div(state.mean, size, out=size).mul_(rate)
    state.rows.sub_(update)
