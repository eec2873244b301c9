"""DeepSpeed as the training engine: every update goes through it. Its config is derived here, never written by hand.

What ZeRO stages 1 and 2 of DeepSpeed keep in parts, a part a rank: seen whole where a checkpoint or a norm needs it.

DeepSpeed strings all parameters into one flat vector and gives every rank an equal piece of it, with the optimizer's
state and, after a backward pass, the averaged gradients of that piece. A parameter may lie in several pieces, or none.
A checkpoint holds whole tensors, so it loads on any number of ranks and at any stage.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grappa_dist.distributed.collectives import Comm
from grappa_dist.models.backbone import forward_precision

State = Mapping[Any, Mapping[str, Tensor]]  # parameter: name of what is known: tensor


@dataclass(frozen=True)
class Fragment:
    """The part of a parameter that lies in this rank's piece of the flat vector."""

    parameter: nn.Parameter
    inside: slice  # of the flattened parameter
    piece: Tensor  # this rank's piece
    place: slice  # of it
    gradient: Tensor | None  # averaged over the ranks; between a backward pass and the step


def fragments(zero: Any) -> Iterator[Fragment]:
    """This rank's fragments of all trained parameters; `zero` is DeepSpeed's optimizer of stage 1 or 2."""
    for number, group in enumerate(zero.bit16_groups):
        gradients = iter(zero.averaged_gradients.get(number) or [])
        for parameter in group:
            mapping = parameter._hp_mapping
            if mapping is not None:
                inside, place = mapping.lp_fragment_address, mapping.hp_fragment_address
                yield Fragment(
                    parameter,
                    slice(inside.start, inside.start + inside.numel),
                    zero.single_partition_of_fp32_groups[number],
                    slice(place.start, place.start + place.numel),
                    next(gradients, None),
                )


def scatter_state(zero: Any, state: State) -> None:
    """Gives this rank its part of an optimizer state of whole tensors; numbers (the step) are every piece's."""
    pieces = zero.optimizer.state
    for own in fragments(zero) if state else ():
        for key, value in state[own.parameter].items():
            if value.ndim == 0:
                pieces[own.piece].setdefault(key, value.clone())
            else:
                whole = pieces[own.piece].setdefault(key, torch.zeros_like(own.piece))
                whole[own.place] = value.flatten()[own.inside].to(whole)


def gather_state(zero: Any, comm: Comm) -> State:
    """The optimizer's state as whole tensors, on every rank; all ranks call it."""
    found = dict[nn.Parameter, dict[str, Tensor]]()
    own = {fragment.parameter: fragment for fragment in fragments(zero)}
    pieces = zero.optimizer.state
    for piece, group in zip(zero.single_partition_of_fp32_groups, zero.bit16_groups, strict=True):
        for parameter in group:
            found[parameter] = {}
            for key, value in sorted(pieces[piece].items()):  # ranks may have got to know them in different orders
                if value.ndim == 0:
                    found[parameter][key] = value.clone()
                    continue
                whole = torch.zeros(parameter.numel(), dtype=value.dtype, device=value.device)
                if parameter in own:
                    whole[own[parameter].inside] = value[own[parameter].place]
                found[parameter][key] = comm.sum_(whole).view_as(parameter)  # each element is one rank's alone
    return found


class Engine:
    """A module and its optimizer under DeepSpeed. Trainable parameters are replicated and their gradients averaged.

    With `zero_stage` 1 the optimizer's state is cut into a part for each rank, with 2 the averaged gradients as well.
    `halves`: see `forward_precision`.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        comm: Comm,
        device: torch.device,
        *,
        zero_stage: int = 0,
        halves: bool | None = None,
    ) -> None:
        deepspeed = _deepspeed(device)
        state: State = dict(optimizer.state)  # whole tensors, from a checkpoint
        if zero_stage:
            _check_zero(zero_stage, optimizer)
            optimizer.state.clear()
        deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo", auto_mpi_discovery=False)
        self._engine, self.optimizer, _, _ = deepspeed.initialize(
            model=_InPrecision(module, device, halves),
            optimizer=optimizer,  # ours: the "Adam" of DeepSpeed's config is AdamW, and LARS needs whole tensors
            dist_init_required=False,
            config={
                # Ranks may hold uneven shares of a batch, so the batch size is a formality: losses carry the weights.
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 1,
                "gradient_clipping": 0.0,  # the default of some versions clips at 1
                "zero_optimization": {"stage": zero_stage},
                "steps_per_print": 2**31,
            },
        )
        self._comm, self._zero = comm, bool(zero_stage)
        self._nothing = torch.zeros((), dtype=torch.float64, device=device)  # of a gradient that lies with other ranks
        if self._zero:
            scatter_state(self.optimizer, state)

    def forward(self, images: Tensor) -> Tensor:
        """The module's output in fp32."""
        found: Tensor = self._engine(images)
        return found

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Adds gradients; after the `last` one of a step they are averaged over the ranks."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss)

    def step(self, learning_rate: float) -> None:
        """One update, which also clears the gradients."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()

    @torch.no_grad()
    def clip(self, groups: Sequence[Sequence[nn.Parameter]], max_norm: float | None) -> list[float]:
        """The norms of the averaged gradients, by group; scales each group's to `max_norm` at most, if one is given.

        To be called between the last `backward` and `step`; all ranks call it.
        """
        gradients = self._gradients()
        own = [[g for p in group for g in gradients.get(p, [])] for group in groups]
        squares = [torch.stack(torch._foreach_norm(g)).double().square().sum() if g else self._nothing for g in own]
        norms = (self._comm.sum_(torch.stack(squares)) if self._zero else torch.stack(squares)).sqrt()
        if max_norm is not None:
            factors = (max_norm / norms.clamp_min(1e-30)).clamp_max(1.0).float()
            for of_group, factor in zip(own, factors, strict=True):
                if of_group:
                    torch._foreach_mul_(of_group, factor)
        found: list[float] = norms.tolist()
        return found

    def _gradients(self) -> dict[nn.Parameter, list[Tensor]]:
        """This rank's averaged gradients: whole, or under ZeRO its fragments."""
        if not self._zero:
            learning = (p for group in self.optimizer.param_groups for p in group["params"])
            return {p: [p.grad] for p in learning if p.grad is not None}
        return {f.parameter: [f.gradient] for f in fragments(self.optimizer) if f.gradient is not None}

    def state(self) -> State:
        """What the optimizer knows of each parameter, as whole tensors; all ranks call it."""
        return gather_state(self.optimizer, self._comm) if self._zero else self.optimizer.state

    def close(self) -> None:
        self._engine.destroy()


class _InPrecision(nn.Module):
    """A module that enters its precision itself: an autocast around DeepSpeed's engine would end at its door."""

    def __init__(self, module: nn.Module, device: torch.device, halves: bool | None) -> None:
        super().__init__()
        self.module, self._device, self._halves = module, device, halves

    def forward(self, images: Tensor) -> Tensor:
        with forward_precision(self._device, bf16=self._halves):
            found: Tensor = self.module(images).float()
        return found


def _check_zero(stage: int, optimizer: torch.optim.Optimizer) -> None:
    if stage not in (1, 2):
        raise ValueError(f"zero_stage={stage}: must be 0, 1 or 2; stage 3 would cut up the frozen backbone as well")
    if not isinstance(optimizer, torch.optim.Adam):
        raise ValueError(f"zero_stage={stage}: {type(optimizer).__name__} needs whole tensors, which ZeRO cuts up")


def _deepspeed(device: torch.device) -> Any:
    """DeepSpeed, quiet, and without the C++ extension that its CPU backend would compile for half a minute."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed
