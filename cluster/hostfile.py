"""Reads a hostfile: one line a machine, `[user@]host slots=NUMBER_OF_GPUS`, with `#` comments.

    python3 cluster/hostfile.py hostfile        prints `host slots` a line, or says in one sentence what is wrong (exit code 1)

DeepSpeed reads the same file with a looser eye: it takes `node1, slots=2` for a host called "node1,", `slots=2.5` for 2 and
`slots=0` for a machine, and then waits for it. Everything it would misread is refused here. Needs nothing but Python.
"""

import re
import sys

EXAMPLE = "write one line a machine, such as: node1 slots=8"
LOCAL_NAMES = {"localhost", "127.0.0.1"}


class HostfileError(ValueError):
    """One sentence for the person who wrote the file."""


def parse_line(line: str, where: str) -> tuple[str, int]:
    """One line without its comment -> (host, slots)."""
    host, *options = line.split()
    if host.endswith(",") or any("," in option for option in options):
        raise HostfileError(
            f"{where}: there is a comma in '{line}'; host and slots stand apart by a space: node1 slots=8"
        )
    if re.search(r"[\[\]{}*?]", host):
        raise HostfileError(
            f"{where}: '{host}' looks like a range of hosts, and ranges are not expanded; write one line a host"
        )
    if ":" in host:
        raise HostfileError(
            f"{where}: '{host}' has a colon; give a port (or an IPv6 address) in ~/.ssh/config, and only the name here"
        )
    if not re.fullmatch(r"([\w.-]+@)?[A-Za-z0-9]([\w.-]*\w)?", host, re.ASCII):
        raise HostfileError(f"{where}: '{host}' is no host name; {EXAMPLE}")
    if not options:
        raise HostfileError(f"{where}: '{line}' does not say how many GPUs to use; write: {host} slots=8")
    slots = re.fullmatch(r"slots=(\d+)", options[0], re.ASCII)
    if len(options) > 1 or not slots:
        raise HostfileError(
            f"{where}: '{' '.join(options)}' should be slots= and a whole number, without spaces: {host} slots=8"
        )
    if int(slots[1]) < 1:
        raise HostfileError(
            f"{where}: '{host}' has no slots; slots is the number of GPUs to use, at least 1 (or take the line out)"
        )
    return host, int(slots[1])


def parse(text: str, name: str = "hostfile") -> list[tuple[str, int]]:
    """The text of a hostfile -> [(host, slots), ...] in its order; the first host is the one where all processes meet."""
    hosts, lines = [], {}
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.split("#")[0].strip()
        if not line:
            continue
        host, slots = parse_line(line, f"{name}, line {number}")
        machine = host.split("@")[-1]
        if machine in lines:
            raise HostfileError(
                f"{name}, line {number}: '{machine}' is already on line {lines[machine]}; write one line a machine"
            )
        lines[machine] = number
        hosts.append((host, slots))
    if not hosts:
        raise HostfileError(f"{name} names no host: {EXAMPLE}")
    local = LOCAL_NAMES & lines.keys()
    if local and len(hosts) > 1:
        raise HostfileError(
            f"{name}, line {lines[min(local)]}: the other hosts cannot reach it by that name; write its name or address"
        )
    return hosts


def read(path: str) -> list[tuple[str, int]]:
    """A path -> [(host, slots), ...]."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            return parse(file.read(), path)
    except FileNotFoundError:
        raise HostfileError(f"{path} does not exist: {EXAMPLE}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise HostfileError(f"{path} cannot be read: {error}") from None


if __name__ == "__main__":
    try:
        for host, slots in read(sys.argv[1] if len(sys.argv) > 1 else "hostfile"):
            print(host, slots)
    except HostfileError as error:
        sys.exit(str(error))
