"""DeepSpeed as the training engine: every update goes through it. Its config is derived here, never written by hand.

ZeRO stages 1 and 2 concatenate the parameters of a group to a flat vector. Every rank has an equal piece of it, with
the optimizer's state of that piece and, after a backward pass, its averaged gradients. A parameter may lie in several
pieces. Checkpoints and norms need whole tensors, which the accessors of `deepspeed.utils` read and write. So a
checkpoint loads on any number of ranks and at any stage. What the accessors lack:

- Numbers of the optimizer's state (Adam's step) have no accessor. They are read and written in the torch optimizer,
  whose groups have the flat piece as their only parameter.
- Before the first step the state has no accessor either, since DeepSpeed links it to the parameters after that step;
  and with several groups it links the first one only. So it is linked here, by the function that DeepSpeed uses.
- `safe_get_local_*` are for ZeRO stage 3, so a norm takes an all-reduce of each whole gradient.

Left to itself DeepSpeed waits for the device at every forward pass and step, to measure its speed; at every step of
ZeRO, for the norm of the gradient; and a world of one copies all gradients into buffers and back, to sum them over one
rank. All of that is off, by its settings, and gradients of a world of one are said to be finished only at the step.
"""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from grappa_dist.distributed.collectives import Comm

State = Mapping[Any, Mapping[str, Tensor]]  # parameter: name of a part of its optimizer state: tensor


class Engine:
    """A module and its optimizer under DeepSpeed. Trainable parameters are replicated and their gradients averaged.

    With `zero_stage` 1 the optimizer's state is cut into a part for each rank, with 2 the averaged gradients as well.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        comm: Comm,
        device: torch.device,
        *,
        zero_stage: int = 0,
    ) -> None:
        deepspeed = _deepspeed(device)
        state: State = dict(optimizer.state)  # whole tensors, from a checkpoint
        groups = [list[nn.Parameter](group["params"]) for group in optimizer.param_groups]
        if zero_stage:
            _check_zero(zero_stage, optimizer)
            optimizer.state.clear()
        deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo", auto_mpi_discovery=False)
        self._engine, self.optimizer, _, _ = deepspeed.initialize(
            model=_OfEngine(module),
            optimizer=optimizer,  # ours: the "Adam" of DeepSpeed's config is AdamW, and LARS needs whole tensors
            dist_init_required=False,
            config={
                # Ranks may hold uneven parts of a batch, so the batch size is a formality: losses carry the weights.
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 1,
                "gradient_clipping": 0.0,  # the default of some versions clips at 1
                "zero_optimization": {"stage": zero_stage, **_without_norms(zero_stage)},
                "steps_per_print": 2**31,
                "timers": {"throughput": {"enabled": False, "synchronized": False}},
            },
        )
        self._parameters = [p for group in groups for p in group]
        self._alone = comm.size == 1 and not zero_stage  # nothing to sum, and no part of the state elsewhere
        self._zero = _ZeroState(optimizer, groups) if zero_stage else None
        if self._zero is not None and state:
            self._zero.scatter(state)

    def forward(self, images: Tensor) -> Tensor:
        """The module's output in fp32."""
        found: Tensor = self._engine(images)
        return found

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Adds gradients; after the `last` one of a step they are averaged over the ranks."""
        self._engine.set_gradient_accumulation_boundary(last and not self._alone)
        self._engine.backward(loss)
        if last and self._alone:  # as the sum over ranks does: an optimizer passes over what has no gradient
            for parameter in self._parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)

    def step(self, learning_rate: float) -> None:
        """One update, which also clears the gradients."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.set_gradient_accumulation_boundary(True)  # which is not the default of DeepSpeed, and see above
        self._engine.step()

    @torch.no_grad()
    def clip(self, groups: Sequence[Sequence[nn.Parameter]], max_norm: float | None) -> Tensor:
        """The norms of the averaged gradients by group, (groups,) float64 on the device; scales each group's to
        `max_norm` at most, if one is given.

        To be called between the last `backward` and `step`; all ranks call it.
        """
        gradients = self.gradients()
        of_groups = [{p: gradients[p] for p in group if p in gradients} for group in groups]
        nothing = torch.zeros((), dtype=torch.float64, device=self._parameters[0].device)
        squares = [
            torch.stack(torch._foreach_norm(list(of_group.values()))).double().square().sum() if of_group else nothing
            for of_group in of_groups
        ]
        norms = torch.stack(squares).sqrt()
        if max_norm is not None:
            factors = (max_norm / norms.clamp_min(1e-30)).clamp_max(1.0).float()
            for of_group, factor in zip(of_groups, factors, strict=True):
                if of_group:
                    torch._foreach_mul_(list(of_group.values()), factor)
                    self._set_gradients(of_group)
        return norms

    def gradients(self) -> dict[nn.Parameter, Tensor]:
        """The averaged gradient of each parameter that has one, between the last `backward` and `step`; all ranks call
        it. At ZeRO stage 0 they are the tensors that the optimizer reads, else copies."""
        from deepspeed.utils import safe_get_full_grad

        found = {p: safe_get_full_grad(p) for p in self._parameters}
        return {p: gradient for p, gradient in found.items() if gradient is not None}

    def _set_gradients(self, gradients: Mapping[nn.Parameter, Tensor]) -> None:
        """Writes back what `gradients` returned, after it was changed."""
        from deepspeed.utils import safe_set_full_grad

        for parameter, gradient in gradients.items() if self._zero is not None else ():
            safe_set_full_grad(parameter, gradient)

    def state(self) -> State:
        """The optimizer's state of each parameter, as whole tensors; all ranks call it."""
        return self.optimizer.state if self._zero is None else self._zero.gather()

    def close(self) -> None:
        self._engine.destroy()


class _ZeroState:
    """The state of a torch optimizer whose parameters ZeRO stage 1 or 2 has replaced by a flat piece for each group."""

    def __init__(self, optimizer: torch.optim.Optimizer, groups: Sequence[Sequence[nn.Parameter]]) -> None:
        self._optimizer, self._groups = optimizer, groups

    def scatter(self, state: State) -> None:
        """Gives this rank its part of a state of whole tensors; numbers (the step) are those of every piece."""
        from deepspeed.utils import safe_set_full_optimizer_state

        for piece, group in self._pieces():
            for key, value in state[group[0]].items():
                self._optimizer.state[piece][key] = torch.zeros_like(piece) if value.ndim else value.clone()
        self._link()
        for parameter, known in state.items():
            for key, value in known.items():
                if value.ndim:
                    safe_set_full_optimizer_state(parameter, value, key)

    def gather(self) -> State:
        """The state as whole tensors, on every rank; all ranks call it."""
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link()
        found = dict[nn.Parameter, dict[str, Tensor]]()
        for piece, group in self._pieces():
            of_piece = sorted(self._optimizer.state[piece].items())  # ranks may hold them in other orders
            for parameter in group:
                found[parameter] = {
                    key: safe_get_full_optimizer_state(parameter, key) if value.ndim else value.clone()
                    for key, value in of_piece
                }
        return found

    def _pieces(self) -> list[tuple[Tensor, Sequence[nn.Parameter]]]:
        """This rank's flat piece of each group, and the parameters of the group."""
        return [
            (of_optimizer["params"][0], group)
            for of_optimizer, group in zip(self._optimizer.param_groups, self._groups, strict=True)
        ]

    def _link(self) -> None:
        """Shows the accessors where the state of this rank's pieces is."""
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        for piece, group in self._pieces():
            lazy_init_hp_params_optimizer_state(group, piece, self._optimizer.state)


class _OfEngine(nn.Module):
    """A module as DeepSpeed gets it, whose hooks stay on this one. It enters its precision itself: an autocast around
    DeepSpeed's engine does not reach into it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.module(images).float()
        return found


def _without_norms(stage: int) -> dict[str, bool]:
    """The setting of ZeRO by which a step computes no norm of the gradient, where this version of DeepSpeed has it."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    return {"compute_grad_norm": False} if stage and "compute_grad_norm" in DeepSpeedZeroConfig.model_fields else {}


def _check_zero(stage: int, optimizer: torch.optim.Optimizer) -> None:
    if stage not in (1, 2):
        raise ValueError(f"zero_stage={stage}: must be 0, 1 or 2; stage 3 would cut up the frozen backbone as well")
    if not isinstance(optimizer, torch.optim.Adam):
        raise ValueError(f"zero_stage={stage}: {type(optimizer).__name__} needs whole tensors, which ZeRO cuts up")


def _deepspeed(device: torch.device) -> Any:
    """DeepSpeed, which logs errors only, without its operators in C++: it would compile programs to find out which of
    them can be built, and then one for half a minute."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    vars(deepspeed.ops)["__compatible_ops__"] = defaultdict(bool)  # asking for it would begin the search
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed
