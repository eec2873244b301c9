"""Several machines give what one gives: the same bits where that is promised, and work is spread over them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml

from tests.cluster.machines import Bench
from tests.cluster.rays import pipeline_on, ray_on
from tests.cluster.s3 import s3_on
from tests.cluster.sameness import CLUSTERED, digests, graph, losses, on_one_machine, scores
from tests.cluster.test_faults import write_config
from tests.e2e.runs import ROOT, metrics
from tests.stages import tiny

pytestmark = [pytest.mark.cluster, pytest.mark.long, pytest.mark.timeout(900)]
Figure = Callable[..., None]
SETS = (4, 6, 9)
DEMO = ROOT / "configs" / "demo.yaml"
SHORT = {"epochs": 4, "checkpoint_steps": 5}
SEEDS_APART = 0.22  # points of R-Precision between three seeds on one machine, where they lie closest


def on_three(bench: Bench, config: Path, run: Path, **variables: str) -> float:
    """A whole pipeline with the driver on n0 and a worker on each of n1, n2 and n3; how many seconds it took."""
    head, *workers = [bench[number] for number in range(4)]
    with (
        ray_on(head, workers, **variables) as (address, _),
        pipeline_on(head, address, config, run, **variables) as pipeline,
    ):
        took = pipeline.wait_for(lambda: (run / "model").exists(), patience_s=600)
        assert pipeline.ends() == 0
    return took


def begun(run: Path, num_labels: Sequence[int], what: str) -> set[str]:
    """`host` of rank 0, or number of `ranks`, with which the adaptor sets have been trained."""
    events = [next(e for e in metrics(run, f"adaptors/k={k}") if e["name"] == "begins") for k in num_labels]
    return {str(event[what]) for event in events}


@pytest.fixture(scope="module")
def shared(storage: Path) -> Path:
    """A folder on storage with shards: generated images to train on, and to test on some with labels."""
    folder = Path(tempfile.mkdtemp(prefix="three-", dir=storage))
    tiny.write_shards(folder / "shards" / "test", (11, 6), bad=(), label=lambda row: str(row % 3), seed=1)
    return folder


def config_in(folder: Path, test: list[str], train: list[str] | None = None) -> Path:
    sections: dict[str, dict[str, object]] = {
        "data": {"test": test, **({"train": train} if train else {})},
        "clustering": {"num_labels": SETS},
        "adapt": SHORT,
        "fuse": {**SHORT, "variants": ("average", "neighbours")},
        "resources": {"adapt_ranks": 1},
    }
    return write_config(folder, **sections)


@pytest.fixture(scope="module")
def three(bench: Bench, shared: Path, figure: Figure) -> tuple[Path, Path]:
    """(config, run directory) of a run on three machines, its shards on a path that all see."""
    config = config_in(shared, [str(path) for path in sorted((shared / "shards" / "test").iterdir())])
    figure("tiny pipeline on three machines", on_three(bench, config, shared / "run"))
    return config, shared / "run"


def test_partitions_and_graph_of_three_machines_are_those_of_one_to_the_bit(
    three: tuple[Path, Path], folder: Path
) -> None:
    config, run = three
    assert begun(run, SETS, "host") == {"n1", "n2", "n3"}  # each set on another machine

    # The same features and adaptor sets, all else made anew by one worker.
    one = folder / "one"
    one.mkdir()
    for part in ("features/backbone", "adaptors"):
        shutil.copytree(run / part, one / part)
    on_one_machine(config, one, "resources.num_cpus=1", "resources.workers=1")
    assert digests(one, *CLUSTERED) == digests(run, *CLUSTERED)
    assert graph(one) == graph(run)
    assert losses(one, "fusion/neighbours") == pytest.approx(losses(run, "fusion/neighbours"), rel=1e-5)
    assert scores(one) == pytest.approx(scores(run), abs=0.01)


def test_shards_on_an_s3_server_give_what_they_give_on_a_shared_path(
    bench: Bench, three: tuple[Path, Path], shared: Path, folder: Path, figure: Figure
) -> None:
    """From the images to the scores, to the bit; and each machine has read its part from the server."""
    _, run = three
    with s3_on(bench[0], folder / "s3.log") as s3:
        s3.upload(shared / "shards", "images")
        train, test = [[f"s3://images/{at}part-{n}" for n in range(count)] for at, count in (("", 4), ("test/", 2))]
        config = config_in(folder, test, train)
        took = on_three(bench, config, folder / "run", **s3.variables)
        figure("tiny pipeline on three machines, shards on S3", took)
        sent = s3.ranges_sent()
    assert all(sent[machine.address] > 0 for machine in bench.machines[1:]), sent
    assert begun(folder / "run", SETS, "host") == {"n1", "n2", "n3"}
    made = (*CLUSTERED, "adaptors/*/*.safetensors", "fusion/*/grappa.safetensors")
    assert digests(folder / "run", *made) == digests(run, *made)
    assert graph(folder / "run") == graph(run)
    assert scores(folder / "run") == scores(run)


@pytest.fixture(scope="module")
def demo(storage: Path) -> Path:
    """The run directory of configs/demo.yaml on one machine."""
    run = Path(tempfile.mkdtemp(prefix="demo-", dir=storage)) / "run"
    on_one_machine(DEMO, run, "resources.num_cpus=2")
    return run


@pytest.mark.parametrize(("where", "adapt_ranks"), [("path", 1), ("s3", 3)])
def test_the_demo_on_three_machines_scores_as_on_one(
    bench: Bench, demo: Path, folder: Path, figure: Figure, where: str, adapt_ranks: int
) -> None:
    """A machine for each adaptor set, then all three for one after the other; the fusion on three ranks, not two."""
    settings = yaml.safe_load(DEMO.read_text())
    settings["resources"] |= {"workers": 3, "adapt_ranks": adapt_ranks}
    config, run, what = folder / "demo.yaml", folder / "run", f"demo on three machines, {where}, {adapt_ranks} ranks"
    with s3_on(bench[0], folder / "s3.log") if where == "s3" else nullcontext() as s3:
        if s3:
            s3.upload(next(demo.glob("collection-*")), "images")
            settings["data"] |= {"collection": None, "train": ["s3://images/train"], "test": ["s3://images/test"]}
        config.write_text(yaml.safe_dump(settings))
        figure(what, on_three(bench, config, run, **(s3.variables if s3 else {})))
        assert s3 is None or all(s3.ranges_sent()[machine.address] for machine in bench.machines[1:])
    sets = settings["clustering"]["num_labels"]
    assert begun(run, sets, "ranks") == {str(adapt_ranks)}
    assert adapt_ranks > 1 or begun(run, sets, "host") == {"n1", "n2", "n3"}
    assert digests(run, *CLUSTERED) == digests(demo, *CLUSTERED)
    for job in (*(f"adaptors/k={k}" for k in sets), "fusion/neighbours"):
        by = max(abs(a / b - 1) for a, b in zip(losses(run, job), losses(demo, job), strict=True))
        figure(f"{what}: a loss of {job} differs from one machine's by at most", by, "of it")
    found, expected = scores(run), scores(demo)
    assert found.keys() == expected.keys()
    apart = max(abs(found[key] - expected[key]) for key in expected)
    figure(f"{what}: R-Precision differs from one machine's by at most", apart, "points")
    assert apart <= SEEDS_APART
