"""Strategy `local` over the internet: peers that are jobs of their own, and come and go.

    place.py      addresses, and what a peer listens with
    heartbeat.py  that a peer is alive, and which lighthouse answers
    members.py    what a peer brings to an exchange, what it gets, who leads
    meeting.py    who takes part in an exchange, and the exchange
    local.py      the engine: a whole DeepSpeed job that meets the others after every `parallel.local_steps` steps
    start.py      from flags to a meeting; what peers must agree on
    link.py       what an exchange costs over a given link

docs/strategies.md shows how to use it.
"""
