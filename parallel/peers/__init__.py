"""Strategy `local` over the internet: peers, which are separate jobs that join and leave a common run.

    setup.py        from flags to a PeerGroup; the facts that peers must agree on
    endpoint.py     addresses, and the sockets on which a peer listens
    heartbeat.py    heartbeats, which also show which lighthouse answers
    membership.py   what a peer announces, who takes part, who leads
    failures.py     peers that cannot be reached or that fail repeatedly
    rendezvous.py   PeerGroup: the members of an exchange, and the exchange
    averaging.py    sums over the members of an exchange
    engine.py       the engine: a DeepSpeed job that exchanges with others after every `parallel.local_steps` steps
    link_cost.py    the cost of an exchange over a given link

docs/strategies.md shows how to use it.
"""
