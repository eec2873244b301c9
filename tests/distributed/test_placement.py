from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grappa_dist import doctor, plan
from grappa_dist.config import Resources
from grappa_dist.distributed.placement import (
    FreeWorkers,
    Rates,
    WorkerParts,
    cpus_per_worker,
    decode_threads,
    describe_placement,
    known_workers,
    sets_per_job,
    split_evenly,
    waves,
)

NODES = st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any)
RANKS = st.integers(1, 12)


def workers_on(sizes: list[int]) -> list[str]:
    """The node of every worker, nodes taking turns."""
    return [f"n{i}" for turn in range(max(sizes)) for i, size in enumerate(sizes) if turn < size]


def placed(sizes: list[int], ranks: int) -> list[list[str]]:
    """The nodes of each job's workers, where jobs start as long as there are free workers."""
    nodes, jobs = workers_on(sizes), list[list[str]]()
    free = FreeWorkers(nodes.__getitem__, range(len(nodes)))
    while (chosen := free.take(ranks)) is not None:
        assert not set(chosen) & set(free)
        jobs.append([nodes[i] for i in chosen])
    assert len(free) == len(list(free)) == len(nodes) - ranks * len(jobs)
    return jobs


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 30), st.integers(1, 30), RANKS)
def test_all_jobs_run_in_the_fewest_waves(num_jobs: int, workers: int, ranks: int) -> None:
    if ranks > workers:
        with pytest.raises(ValueError, match=rf"adapt_ranks={ranks} is more than the {workers} worker"):
            waves(num_jobs, workers, ranks)
        return
    sizes = waves(num_jobs, workers, ranks)
    assert sum(sizes) == num_jobs
    assert all(0 < size <= workers // ranks for size in sizes)
    assert len(sizes) == -(-num_jobs // (workers // ranks))


@settings(max_examples=200, deadline=None)
@given(NODES, RANKS)
def test_a_job_spans_nodes_only_when_no_node_holds_it(sizes: list[int], ranks: int) -> None:
    jobs = placed(sizes, ranks)
    assert len(jobs) == sum(sizes) // ranks
    assert all(len(nodes) == ranks for nodes in jobs)
    assert sum(len(set(nodes)) == 1 for nodes in jobs) == sum(size // ranks for size in sizes)
    if not jobs:
        return
    first = set(jobs[0])
    if max(sizes) >= ranks:  # the node that is left with the fewest
        assert sizes[int(jobs[0][0][1:])] == min(size for size in sizes if size >= ranks)
    else:
        largest_first = sorted(sizes, reverse=True)
        needed = next(n for n in range(1, len(sizes) + 1) if sum(largest_first[:n]) >= ranks)
        assert len(first) == needed


def test_from_a_laptop_to_eight_sets_of_four_gpus() -> None:
    assert waves(8, 1, 1) == [1] * 8
    assert waves(8, 32, 4) == [8]
    assert waves(8, 16, 4) == [4, 4]
    assert [len(set(nodes)) for nodes in placed([3, 3], 2)] == [1, 1, 2]


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 40), st.integers(1, 12))
def test_sets_are_split_in_order_and_evenly_over_the_fewest_jobs(count: int, per_job: int) -> None:
    groups = split_evenly(range(count), per_job)
    assert [item for group in groups for item in group] == list(range(count))
    assert len(groups) == -(-count // per_job)
    sizes = [len(group) for group in groups]
    assert not sizes or (max(sizes) <= per_job and max(sizes) - min(sizes) <= 1 and min(sizes) > 0)


def test_a_group_of_nothing_and_a_job_without_workers_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one item, got 0"):
        split_evenly([1], 0)
    with pytest.raises(ValueError, match="at least one worker, got 0"):
        FreeWorkers(str, ["a"]).take(0)


@pytest.mark.parametrize(
    ("num_sets", "slots", "rates", "expected"),
    [
        (8, 1, Rates(1.0, 0.1, 0.5, overlap=False), 8),  # one decode for all
        (8, 2, Rates(1.0, 0.1, 0.5, overlap=False), 4),
        (8, 8, Rates(1.0, 0.1, 0.5, overlap=False), 1),
        (8, 1, Rates(4.0, 0.0, 0.5, overlap=True), 8),  # decoding binds: eight sets ride for nothing
        (8, 1, Rates(0.1, 0.0, 0.5, overlap=True), 1),  # training binds and nothing is shared
        (7, 2, Rates(1.0, 0.0, 0.0, overlap=False), 4),
        (1, 3, Rates(1.0, 1.0, 1.0, overlap=False), 1),
    ],
)
def test_the_number_of_sets_in_a_job_follows_from_rates_and_workers(
    num_sets: int, slots: int, rates: Rates, expected: int
) -> None:
    assert sets_per_job(num_sets, slots, rates) == expected


def test_a_job_trains_no_more_sets_than_its_memory_holds() -> None:
    rates = Rates(1.0, 0.1, 0.5, overlap=False)  # one decode for all
    assert [sets_per_job(8, 1, rates, most) for most in (1, 3, 4, 8, 20)] == [1, 3, 4, 8, 8]
    assert sets_per_job(8, 8, rates, 5) == 1


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.builds(Rates, *[st.floats(1e-3, 1e3)] * 3, overlap=st.booleans()),
)
def test_no_other_number_of_sets_in_a_job_would_be_done_sooner(num_sets: int, slots: int, rates: Rates) -> None:
    chosen = sets_per_job(num_sets, slots, rates)

    def seconds(per_job: int) -> float:
        return len(waves(len(split_evenly(range(num_sets), per_job)), slots, 1)) * rates.image_s(per_job)

    assert all(seconds(chosen) <= seconds(other) * (1 + 1e-6) for other in range(1, num_sets + 1))


@pytest.mark.parametrize(
    ("jobs", "workers", "ranks", "message"),
    [
        (8, 1, 1, "8 jobs of 1 rank, one after the other, in 8 waves"),
        (8, 32, 4, "8 jobs of 4 ranks, all at once"),
        (5, 4, 2, "5 jobs of 2 ranks, 2 at a time, 1 in the last, in 3 waves"),
        (1, 3, 2, "1 job of 2 ranks, all at once; 1 of 3 workers idle"),
        (0, 3, 2, "nothing to place"),
    ],
)
def test_a_placement_is_described_in_one_line(jobs: int, workers: int, ranks: int, message: str) -> None:
    assert describe_placement(jobs, workers, ranks) == message


def test_a_worker_with_a_gpu_has_its_part_of_the_cpus_and_reads_with_as_many_threads() -> None:
    auto = Resources()
    assert cpus_per_worker(auto, [(128, 8)]) == 16
    assert cpus_per_worker(auto, [(128, 8), (64, 0), (96, 8)]) == 12  # the smallest part; a node without GPUs has none
    assert cpus_per_worker(auto, [(2, 8)]) == 1
    assert decode_threads(auto, 16, gpu=True) == 16


def test_without_gpus_a_worker_has_one_cpu_and_two_threads() -> None:
    assert cpus_per_worker(Resources(), [(128, 0), (64, 0)]) == cpus_per_worker(Resources(), []) == 1
    assert cpus_per_worker(Resources(gpus_per_worker=0), [(128, 8)]) == 1
    assert decode_threads(Resources(), 1, gpu=False) == 2
    assert WorkerParts.here(Resources(num_cpus=6, gpus_per_worker=0)) == WorkerParts(1, 2, gpu=False)
    assert known_workers(Resources(num_cpus=6, gpus_per_worker=0)) == 6


def test_a_number_that_is_given_is_taken() -> None:
    asked = Resources(cpus_per_worker=3, decode_threads=5)
    assert cpus_per_worker(asked, [(128, 8)]) == 3
    assert [decode_threads(asked, 16, gpu=gpu) for gpu in (True, False)] == [5, 5]
    assert decode_threads(Resources(cpus_per_worker=3), 3, gpu=True) == 3


def test_on_this_machine_the_cpus_are_divided_by_its_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    parts = WorkerParts.here(Resources(num_cpus=64))
    assert parts == WorkerParts(16, 16, gpu=True)
    assert [parts.threads(Resources()), parts.threads(Resources(threads=2))] == [16, 2]
    line = plan._workers(Resources(num_cpus=64))
    assert line.endswith("each with 16 CPU and a GPU where there are GPUs; 16 threads of each read ahead")
    monkeypatch.setenv("RAY_ADDRESS", "somewhere:6379")
    assert "a GPU's part of its node's CPUs (1 without GPUs)" in plan._workers(Resources())
    assert "; 8 threads of each" in plan._workers(Resources(decode_threads=8))
    monkeypatch.setattr("grappa_dist.doctor.usable_cores", lambda: 64.0)
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    (cores,) = doctor._cores()
    assert cores.means.startswith("16 for each GPU's worker, of which as many threads read ahead")


@pytest.mark.parametrize("workers", [500, 1000])
def test_the_node_of_a_worker_is_asked_for_when_it_becomes_free_and_never_again(workers: int) -> None:
    asked = list[int]()
    free = FreeWorkers(lambda worker: asked.append(worker) or worker // 8, range(workers))
    for _ in range(workers):
        taken = free.take(1)
        assert taken is not None
        free.add(taken)
    assert len(asked) == 2 * workers
    while (taken := free.take(8)) is not None:
        assert len({worker // 8 for worker in taken}) == 1
    assert len(free) == workers % 8
