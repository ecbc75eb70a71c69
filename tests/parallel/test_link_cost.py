"""parallel/peers/link_cost.py: the line about a measured exchange; test_rendezvous.py has the estimates."""

from __future__ import annotations

from parallel.peers.link_cost import SHARE, line_of_exchange


def test_an_exchange_that_takes_more_than_its_share_gets_advice():
    assert SHARE == 0.05
    line = line_of_exchange(1.0, 3.0, 9.0, 30)
    assert line == (
        "peers     exchange took 1.00 s after 30 steps in 9.00 s and a wait of 3.00 s: 10.0% of the time without the "
        "wait; parallel.local_steps=64 would make it 5%"
    )
    assert line_of_exchange(0.4, 0.0, 9.6, 30).endswith("4.0% of the time without the wait")
