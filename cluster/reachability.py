"""One end of a connection between two hosts: who can reach whom, by which address, how fast.

    python3 cluster/reachability.py '{"role": "listen", "token": "x", "seconds": 20}'
    python3 cluster/reachability.py '{"role": "connect", "token": "x", "port": 23456, "addresses": ["10.0.0.1"], "measure": true}'

Prints lines of `reachability:` and JSON. Sent over SSH to a bare `python3 -`, as probe.py is; needs nothing else.
"""

import json
import random
import select
import socket
import sys
import threading
import time

BLOCK = 2**20
PINGS = 100


def listen(request):
    """Take a free port, say which, and answer whoever knows the token, for some seconds."""
    server = socket.socket()
    # No SO_REUSEADDR: the port must be free for the training processes a moment later. Under 32768, so that no outgoing
    # connection takes it in between.
    for port in random.sample(range(20000, 32000), 200) if not request.get("port") else [request["port"]]:
        try:
            server.bind(("", port))
            break
        except OSError:
            continue
    else:
        say(error="no port is free")
        return
    server.listen(128)
    server.settimeout(0.2)
    say(port=port)
    deadline = time.time() + request["seconds"]
    asked_for = select.poll()
    asked_for.register(sys.stdout, 0)
    while time.time() < deadline and not asked_for.poll(
        0
    ):  # the one who asked has gone, so the port is to be free at once
        try:
            connection = server.accept()[0]
        except TimeoutError:
            continue
        threading.Thread(target=serve, args=(connection, request["token"]), daemon=True).start()


def serve(connection, token):
    """Send the token back, then echo single bytes (pings) until a block of bytes comes, which is counted instead."""
    connection.settimeout(10)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        if connection.recv(256).decode() != token:
            return
        connection.sendall(token.encode())
        for _ in range(PINGS):
            byte = connection.recv(1)
            if not byte:
                return
            connection.sendall(byte)
        received, began = 0, time.time()
        while True:
            block = connection.recv(BLOCK)
            if not block:
                return
            received += len(block)
            if block.endswith(b"."):  # the last byte of the stream: say how much came, in how long
                connection.sendall(json.dumps([received, time.time() - began]).encode())
                return
    except OSError:
        return
    finally:
        connection.close()


def reach(address, port, token, measure):
    """Connect, check that it is the right host, and time it. Returns facts, or the reason why not."""
    with socket.socket() as connection:
        connection.settimeout(3)
        try:
            connection.connect((address, port))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.sendall(token.encode())
            if connection.recv(256).decode(errors="replace") != token:
                return {"error": "another program answers there"}
            facts = {"here": connection.getsockname()[0]}
            if not measure:
                return facts
            times = []
            for _ in range(PINGS):
                began = time.perf_counter()
                connection.sendall(b"p")
                connection.recv(1)
                times.append(time.perf_counter() - began)
            facts["latency_ms"] = round(sorted(times)[len(times) // 2] * 1000, 3)
            block, until = bytes(BLOCK), time.time() + 1.0
            while time.time() < until:
                connection.sendall(block)
            connection.sendall(b".")
            received, seconds = json.loads(connection.recv(256).decode())
            facts["gigabits"] = round(received * 8 / seconds / 1e9, 2)
            return facts
        except TimeoutError:
            return {"error": "no answer"}
        except (OSError, ValueError) as error:
            return {"error": str(error)}


def connect(request):
    """Try every address at once; say what came of each."""
    results = {}
    threads = [
        threading.Thread(
            target=lambda a=address: results.update(
                {a: reach(a, request["port"], request["token"], request.get("measure"))}
            )
        )
        for address in request["addresses"]
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    say(reached=results)


def say(**facts):
    print("reachability:" + json.dumps(facts), flush=True)


if __name__ == "__main__":
    REQUEST = json.loads(sys.argv[1])
    listen(REQUEST) if REQUEST["role"] == "listen" else connect(REQUEST)
