"""DeepSpeed as the training engine: every update goes through it. Its config is derived here, never written by hand."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from torch import Tensor, nn

from grappa_dist.dist.comm import Comm


class Engine:
    """A module and its optimizer under DeepSpeed. Trainable parameters are replicated and their gradients averaged."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, comm: Comm, device: torch.device) -> None:
        deepspeed = _deepspeed(device)
        deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo", auto_mpi_discovery=False)
        self._engine, self.optimizer, _, _ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,  # ours: the "Adam" of DeepSpeed's config is AdamW, and LARS needs whole tensors
            dist_init_required=False,
            config={
                # Ranks may hold uneven shares of a batch, so the batch size is a formality: losses carry the weights.
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 1,
                "gradient_clipping": 0.0,  # the default of some versions clips at 1
                "zero_optimization": {"stage": 0},
                "steps_per_print": 2**31,
            },
        )
        self._device = device

    def forward(self, images: Tensor) -> Tensor:
        """The module's output in fp32; on a GPU it runs in bf16 around fp32 parameters."""
        with torch.autocast("cuda", torch.bfloat16, enabled=self._device.type == "cuda"):
            return self._engine(images).float()

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Adds gradients; after the `last` one of a step they are averaged over the ranks."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss)

    def step(self, learning_rate: float) -> None:
        """One update, which also clears the gradients."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()

    def close(self) -> None:
        self._engine.destroy()


def _deepspeed(device: torch.device) -> Any:
    """DeepSpeed, quiet, and without the C++ extension that its CPU backend would compile for half a minute."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed
