"""Heat maps of attention: shares are coloured by their distance from an even share."""

from __future__ import annotations

from grappa_dist.report.attention import heat_map, saturation


def test_even_shares_are_blank_and_the_strongest_is_full() -> None:
    even = heat_map([[0.25] * 4], (["1"], list("abcd")), title="t", most=2.0)
    assert even.count('fill-opacity="0.00"') == 4
    rows = [[0.5, 0.25, 0.25, 0.0]]
    assert saturation([rows]) == 2.0
    chart = heat_map(rows, (["1"], list("abcd")), title="t", most=2.0)
    assert 'class="more"' in chart
    assert chart.count('fill-opacity="1.00"') == 2
    assert "<title>1, a: 0.5000</title>" in chart
