from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grappa_dist.distributed.collectives import Comm
from grappa_dist.models.precision import products_in
from grappa_dist.training.deepspeed_engine import Engine, _deepspeed
from grappa_dist.training.optim import Lars
from tests.models import tiny
from tests.processes import run_ranks

pytest.importorskip("deepspeed")
STEPS, CPU = 4, torch.device("cpu")


def small_model() -> nn.Module:
    """Frozen, then matrices, a norm and biases that learn."""
    model = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    tiny.fill(model, seed=2, scale=0.5)
    model[0].requires_grad_(False)
    return model


def optimizer_of(kind: str, model: nn.Module) -> torch.optim.Optimizer:
    learning = [p for p in model.parameters() if p.requires_grad]
    if kind == "adam":
        return torch.optim.Adam(learning, lr=1e-2, weight_decay=1e-3)
    return Lars(learning, lr=0.5, weight_decay=1e-3)


def batch(step: int) -> Tensor:
    return torch.randn(7, 4, generator=torch.Generator().manual_seed(step))


def rate(step: int, kind: str) -> float:
    return (1e-2 if kind == "adam" else 5.0) * (1 - step / STEPS)


def alone(kind: str) -> dict[str, Tensor]:
    """The whole batch, and nothing but torch."""
    model = small_model()
    optimizer = optimizer_of(kind, model)
    for step in range(STEPS):
        optimizer.zero_grad()
        (model(batch(step)).square().sum() / 7).backward()
        for group in optimizer.param_groups:
            group["lr"] = rate(step, kind)
        optimizer.step()
    return model.state_dict()


def through_the_engine(comm: Comm, kind: str, sizes: tuple[int, ...], times: int) -> list[dict[str, Tensor]]:
    """A rank with its share of every batch; `times` engines, one after the other."""
    results = []
    for _ in range(times):
        model = small_model()
        engine = Engine(model, optimizer_of(kind, model), comm, CPU)
        for step in range(STEPS):
            share = batch(step).split(list(sizes))[comm.rank]
            loss = engine.forward(share).square().sum() * (comm.size / 7)
            engine.backward(loss)
            engine.step(rate(step, kind))
        engine.close()
        results.append(model.state_dict())
    return results


@pytest.mark.parametrize("sizes", [(7,), (5, 2), (7, 0)])
@pytest.mark.parametrize("kind", ["adam", "lars"])
def test_an_optimizer_through_the_engine_is_the_bare_one_on_the_whole_batch(kind: str, sizes: tuple[int, ...]) -> None:
    expected = alone(kind)
    assert not torch.allclose(expected["4.weight"], small_model().state_dict()["4.weight"], atol=1e-3)
    results = run_ranks(through_the_engine, len(sizes), kind, sizes, 1)
    for (found,) in results:
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)  # sums in another order
            assert torch.equal(tensor, results[0][0][name])
    assert torch.equal(results[0][0]["0.weight"], small_model().state_dict()["0.weight"])


def test_two_engines_one_after_the_other_give_the_same() -> None:
    for first, second in run_ranks(through_the_engine, 2, "adam", (4, 3), 2):
        assert all(torch.equal(first[name], second[name]) for name in first)


class InBf16(nn.Module):
    """A module that enters its precision itself, as a backbone does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: Tensor) -> Tensor:
        with products_in("bf16", CPU):
            found: Tensor = self.module(images)
        return found


def steps_in_bf16(comm: Comm, bf16: bool, zero_stage: int) -> dict[str, set[torch.dtype]]:
    """The types that a linear layer computes in, and of all that two steps leave, when DeepSpeed asks whether autocast
    is on for the CPU: unpatched, it asks for GPUs alone."""
    on, seen, model = torch.is_autocast_enabled, set[torch.dtype](), small_model()
    model[4].register_forward_hook(lambda module, given, made: seen.add(made.dtype))
    gradients: set[torch.dtype] = set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "is_autocast_enabled", lambda kind="cpu": on(kind))
        module = InBf16(model) if bf16 else model
        engine = Engine(module, optimizer_of("adam", model), comm, CPU, zero_stage=zero_stage)
        for step in range(2):
            z = engine.forward(batch(step))
            engine.backward(z.square().sum() / 7)
            gradients |= {gradient.dtype for gradient in engine.gradients().values()}
            engine.step(1e-2)
    weights = {tensor.dtype for tensor in model.state_dict().values()}
    moments = {known[name].dtype for known in engine.state().values() for name in ("exp_avg", "exp_avg_sq")}
    moved = not torch.equal(model[4].weight, small_model()[4].weight)
    engine.close()
    assert moved
    return {"linear": seen, "output": {z.dtype}, "gradients": gradients, "weights": weights, "moments": moments}


def in_several_ways(comm: Comm, ways: tuple[tuple[bool, int], ...]) -> list[dict[str, set[torch.dtype]]]:
    return [steps_in_bf16(comm, bf16, zero_stage) for bf16, zero_stage in ways]


def test_in_bf16_layers_compute_in_bfloat16_and_all_that_stays_is_float32_on_a_cpu_where_asked_for() -> None:
    (found,) = run_ranks(in_several_ways, 1, ((True, 0), (True, 1), (True, 2), (False, 0)))
    assert [of_way.pop("linear") for of_way in found] == [{torch.bfloat16}] * 3 + [{torch.float32}]
    for of_way in found:
        assert len(of_way) == 4
        assert all(types == {torch.float32} for types in of_way.values())


PARTITIONED: tuple[dict[str, Any], ...] = (
    {"zero_optimization": {"stage": 1}},
    {"zero_optimization": {"stage": 2}},
    {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}},
)


def lars_on_flat_pieces(comm: Comm) -> list[str]:
    """The errors of LARS in place of an update of DeepSpeed's flat partitions of the parameters."""
    deepspeed, refusals = _deepspeed(CPU), []
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    for settings in PARTITIONED:
        model = small_model()
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer_of("lars", model),
            dist_init_required=False,
            config={"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True, **settings},
        )
        images = batch(0).to(next(model.parameters()).dtype)
        engine.backward(engine(images).float().square().sum())
        with pytest.raises(ValueError, match="use ZeRO stage 0") as refused:
            engine.step()
        engine.destroy()
        refusals.append(str(refused.value))
    return refusals


def test_lars_refuses_what_zero_and_bfloat16_partitions_have_flattened() -> None:
    (refusals,) = run_ranks(lars_on_flat_pieces, 1)
    assert len(refusals) == len(PARTITIONED)
    assert all("Lars: parameters must keep their shapes" in refusal for refusal in refusals)


def gradients_by_parts(comm: Comm) -> list[Tensor]:
    model = small_model()
    engine = Engine(model, optimizer_of("adam", model), comm, CPU)
    whole = []
    for parts in ([7], [3, 4], [1] * 7, [7, 0]):
        chunks = batch(0).split(parts)
        for i, chunk in enumerate(chunks):
            engine.backward(engine.forward(chunk).square().sum() * (comm.size / 7), last=i == len(parts) - 1)
        whole.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        engine.step(0.0)
        assert not any(p.grad is not None and p.grad.any() for p in model.parameters())
    engine.close()
    return whole


def test_gradients_add_up_until_the_last_one_and_are_cleared_by_the_step() -> None:
    for results in run_ranks(gradients_by_parts, 2):
        for found in results:
            torch.testing.assert_close(found, results[0], rtol=1e-5, atol=1e-6)
        assert results[0].abs().sum() > 0


def steps_of_sgd(comm: Comm, scales: tuple[float, ...]) -> list[Tensor]:
    changes = []
    for scale in scales:
        model = small_model()
        learning = [p for p in model.parameters() if p.requires_grad]
        engine = Engine(model, torch.optim.SGD(learning, lr=1.0), comm, CPU)
        before = torch.nn.utils.parameters_to_vector(learning).detach()
        engine.backward(engine.forward(batch(0)).square().sum() * scale)
        engine.step(1e-3 / scale)
        engine.close()
        changes.append(torch.nn.utils.parameters_to_vector(learning).detach() - before)
    return changes


def test_gradients_are_not_clipped() -> None:
    """Some versions of DeepSpeed clip at a norm of 1 unless the config sets the bound to 0."""
    ((small, large),) = run_ranks(steps_of_sgd, 1, (2.0**-10, 2.0**10))
    assert small.norm() > 0
    torch.testing.assert_close(small, large)


def test_no_operator_of_deepspeeds_is_compiled_to_see_whether_it_can_be() -> None:
    """Trials leave a folder in TMPDIR where their process is killed."""
    program = """
import tempfile, torch
from grappa_dist.training.deepspeed_engine import _deepspeed
tempfile.mkdtemp = lambda *args, **kwargs: print("a folder for a trial") or 1 / 0
assert not _deepspeed(torch.device("cpu")).ops.__compatible_ops__.get("deepspeed_shm_comm", False)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "trial" not in done.stdout


def what_deepspeed_adds(comm: Comm, stage: int) -> dict[str, Any]:
    """How often steps in two parts wait for the device and sum over ranks; gradients of what the loss lacks."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.zero import stage_1_and_2

    waits, sums, all_reduce, missing = list[str](), list[int](), torch.distributed.all_reduce, list[int]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(get_accelerator(), "synchronize", lambda *given: waits.append("synchronize"))
        patch.setattr(stage_1_and_2, "is_invalid_grad_norm", lambda norm: waits.append("norm") is not None)
        patch.setattr(torch.distributed, "all_reduce", lambda *a, **k: sums.append(1) or all_reduce(*a, **k))
        model = small_model()
        model.register_parameter("idle", nn.Parameter(torch.ones(3)))
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
        engine = Engine(model, optimizer, comm, CPU, zero_stage=stage)
        sums.clear()
        for step in range(STEPS):  # DeepSpeed begins to measure after two of them
            for last, share in enumerate(batch(step).split([3, 4])):
                engine.backward(engine.forward(share).square().sum(), last=bool(last))
            missing.append(sum(p.grad is None for p in model.parameters() if p.requires_grad))
            engine.step(1e-2)
    engine.close()
    return {"waits": waits, "sums": len(sums), "missing": set(missing), "idle": model.idle.detach()[0].item()}


def what_deepspeed_adds_at(comm: Comm, stages: tuple[int, ...]) -> list[dict[str, Any]]:
    return [what_deepspeed_adds(comm, stage) for stage in stages]


def test_deepspeed_waits_for_nothing_and_in_a_world_of_one_sums_nothing() -> None:
    (alone,) = run_ranks(what_deepspeed_adds_at, 1, (0,))
    assert alone == [{"waits": [], "sums": 0, "missing": {0}, "idle": pytest.approx(1 - STEPS * 1e-2, abs=1e-3)}]
    for rank in run_ranks(what_deepspeed_adds_at, 2, (0, 1, 2)):
        assert [stage["waits"] for stage in rank] == [[], [], []]
        assert rank[0]["sums"] == STEPS
        assert rank[0]["missing"] == {0}
        assert rank[0]["idle"] == alone[0]["idle"]  # what has no gradient decays alike
