"""What ZeRO stages 1 and 2 of DeepSpeed keep in parts, a part a rank: seen whole where a checkpoint or a norm needs it.

DeepSpeed strings all parameters into one flat vector and gives every rank an equal piece of it, with the optimizer's
state and, after a backward pass, the averaged gradients of that piece. A parameter may lie in several pieces, or none.
A checkpoint holds whole tensors, so it loads on any number of ranks and at any stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grappa_dist.distributed.collectives import Comm

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
