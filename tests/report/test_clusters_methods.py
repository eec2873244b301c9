from __future__ import annotations

from dataclasses import replace

from grappa_dist.report.clusters import method_table
from grappa_dist.report.content import Clustering

PLAIN = Clustering(
    k=4, inertia=[3.0, 2.0, 1.5], sizes=[0, 3], largest=7, median=2.5, imbalance=1.2,
    empty_repaired=1, empty_left=0, singletons_share=0.2, exact_share=0.001,
)  # fmt: skip


def test_exact_clusterings_take_a_line() -> None:
    assert method_table([PLAIN, replace(PLAIN, k=8)]).count("<table") == 0
    assert "exact k-means" in method_table([PLAIN])


def test_a_sample_is_never_silent() -> None:
    page = method_table([PLAIN, replace(PLAIN, k=8, method="sampled", sampled_share=0.125, reason="a <b>reason")])
    assert "12.5 % of images" in page
    assert "k=8: sampled, a &lt;b&gt;reason" in page


def test_little_agreement_is_warned_of() -> None:
    high = replace(PLAIN, method="approximate", agreement=0.991, agreement_rows=4096)
    assert "99.10 % of 4,096" in method_table([high])
    assert "larger clustering.probes" not in method_table([high])
    assert "k=4: fewer than 95.0 %" in method_table([replace(high, agreement=0.94)])


def test_what_a_bound_on_sizes_took_is_shown() -> None:
    page = method_table([replace(PLAIN, bound=12, moved=1234, unbalanced_inertia=1.2, restarts=[1.5, 1.8])])
    assert "1,234 (inertia +25.00 %)" in page
    assert "2 (+20.00 %)" in page
