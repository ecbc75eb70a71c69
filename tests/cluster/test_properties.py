"""Hostfiles of any text give hosts or one sentence (Hypothesis)."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st
from properties import some_examples

from cluster.hostfile import HostfileError, parse

PIECES = st.sampled_from(
    ["node1", "node2", "me@node3", "localhost", "-oProxyCommand=x", "10.0.0.1", "::1", "slots=", "slots=2", "slots=0"]
    + ["slots=2.5", "=", "4", "#", ",", " ", "\t", "\n", "\r\n", "\ufeff", "[1-4]", "٣", "ñ"]
)
HOSTS = st.text("abAB19-_", min_size=1, max_size=8).map("n{}x.net".format)


@some_examples(200)
@given(st.lists(PIECES, max_size=12).map("".join) | st.text(max_size=30))
def test_any_text_gives_hosts_or_one_sentence(text):
    try:
        hosts = parse(text)
    except HostfileError as error:
        assert len(str(error).splitlines()) == 1 and str(error).startswith("hostfile")
        return
    machines = [host.split("@")[-1] for host, _ in hosts]
    assert hosts and len(set(machines)) == len(machines)
    for host, slots in hosts:
        assert re.fullmatch(r"[\w.@-]+", host, re.ASCII) and not host.startswith("-") and slots >= 1


@some_examples(25)
@given(st.lists(st.tuples(HOSTS, st.integers(1, 999_999)), min_size=1, max_size=4, unique_by=lambda pair: pair[0]))
def test_hosts_survive_as_text(hosts):
    text = "".join(f"  {host}\tslots={slots}   # rack\n\n" for host, slots in hosts)
    assert parse(text) == hosts
