"""Test a connection between two hosts: whether one reaches the other, by which address, and how fast.

    python3 cluster/reachability.py '{"role": "listen", "token": "x", "seconds": 20}'
    python3 cluster/reachability.py '{"role": "connect", "token": "x", "port": 23456, "addresses": ["10.0.0.1"]}'

Prints lines of `reachability:` and JSON. Like probe.py, it is sent over SSH to a bare `python3 -` (3.6 or newer).
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
    """Listen on a free port, report it, and answer clients that know the token, for `seconds` seconds."""
    server = socket.socket()
    # PyTorch's store listens on this port a moment later, with SO_REUSEADDR too. Without it, connections of the last
    # start (TIME_WAIT, 60 s) would block a MASTER_PORT that the user chose, and with it every restart.
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Ports below 32768, so that no outgoing connection takes the port in between.
    for port in random.sample(range(20000, 32000), 200) if not request.get("port") else [request["port"]]:
        try:
            server.bind(("", port))
            server.listen(128)
            break
        except OSError:
            continue
    else:
        say(error=f"port {request['port']} is in use" if request.get("port") else "no port is free")
        return
    server.settimeout(0.2)
    say(port=port)
    deadline = time.time() + request["seconds"]
    launcher = select.poll()
    launcher.register(sys.stdout, 0)
    while time.time() < deadline and not launcher.poll(0):  # when the launcher has gone, free the port at once
        try:
            connection = server.accept()[0]
        except socket.timeout:  # noqa: UP041 - TimeoutError since Python 3.10 only
            continue
        threading.Thread(target=serve, args=(connection, request["token"]), daemon=True).start()


def serve(connection, token):
    """Return the token, echo single bytes (pings), then count the bytes of a stream until its last byte, a dot."""
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
            if block.endswith(b"."):  # the end of the stream: report its size and duration
                connection.sendall(json.dumps([received, time.time() - began]).encode())
                return
    except OSError:
        return
    finally:
        connection.close()


def reach(address, port, token, measure):
    """Connect, check that the right host answers, and measure the link. Return facts, or the reason of the failure."""
    with socket.socket() as connection:
        connection.settimeout(3)
        try:
            connection.connect((address, port))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.sendall(token.encode())
            if connection.recv(256).decode(errors="replace") != token:
                return {"error": "another program answers there"}
            facts = {"here": connection.getsockname()[0], "there": connection.getpeername()[0]}
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
        except socket.timeout:  # noqa: UP041 - TimeoutError since Python 3.10 only
            return {"error": "no answer"}
        except (OSError, ValueError) as error:
            return {"error": str(error)}


def connect(request):
    """Try all addresses in parallel and report the result of each."""
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
