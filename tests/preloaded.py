"""What a rank would take seconds to import: the server that ranks are forked from imports it once (tests/processes.py).

Nothing here starts a thread or talks to a device, so that what is forked is whole.
"""

from __future__ import annotations

import os

from grappa_dist._compat import declare_torchvision_ops

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # of the server alone: a rank's environment is that of the test
declare_torchvision_ops()

import faiss  # noqa: E402, F401
import pytest  # noqa: E402, F401
import timm  # noqa: E402, F401
import torch._dynamo  # noqa: E402

import grappa_dist.pipeline  # noqa: E402, F401
from grappa_dist.training.deepspeed_engine import _deepspeed  # noqa: E402

_deepspeed(torch.device("cpu"))  # looks once which operators could be compiled here, for which it calls gcc
