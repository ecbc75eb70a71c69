"""Read a hostfile: one machine per line, `[user@]host slots=NUMBER_OF_GPUS`, with `#` comments.

    python3 cluster/hostfile.py hostfile     prints a line `host slots` per machine, or an error message (exit code 1)

DeepSpeed reads the same file less strictly: it takes `node1, slots=2` for a host named "node1,", `slots=2.5` for 2 and
`slots=0` for a machine, and then waits for that machine. Everything that DeepSpeed would misread is rejected here.
Needs only the standard library of Python 3.6: the launcher reads the hostfile before it looks for a newer Python. There
the annotations of its functions must be texts.
"""

import re
import sys

EXAMPLE = "write one machine per line, such as: node1 slots=8"
LOCAL_NAMES = {"localhost", "127.0.0.1"}


class HostfileError(ValueError):
    """One sentence for the user who wrote the file."""


def parse_line(line: str, where: str) -> "tuple[str, int]":
    """Parse one line without its comment into (host, slots)."""
    host, *options = line.split()
    if host.endswith(",") or any("," in option for option in options):
        raise HostfileError(f"{where}: '{line}' has a comma; separate host and slots by a space: node1 slots=8")
    if host.startswith("-"):
        raise HostfileError(f"{where}: '{host}' begins with a dash, which ssh would read as an option; {EXAMPLE}")
    if re.search(r"[\[\]{}*?]", host):
        raise HostfileError(
            f"{where}: '{host}' looks like a range of hosts, which is not expanded; write one host per line"
        )
    if ":" in host:
        raise HostfileError(
            f"{where}: '{host}' has a colon; write the name only, and its port or IPv6 address in ~/.ssh/config"
        )
    if not re.fullmatch(r"(\w[\w.-]*@)?[A-Za-z0-9]([\w.-]*\w)?", host, re.ASCII):
        raise HostfileError(f"{where}: '{host}' is not a host name; {EXAMPLE}")
    if not options:
        raise HostfileError(f"{where}: '{line}' does not say how many GPUs to use; write: {host} slots=8")
    slots = re.fullmatch(r"slots=(\d{1,6})", options[0], re.ASCII)
    if len(options) > 1 or not slots:
        raise HostfileError(
            f"{where}: '{' '.join(options)}' must be slots= and a whole number, without spaces: {host} slots=8"
        )
    if int(slots[1]) < 1:
        raise HostfileError(f"{where}: '{host}' has slots=0; write the number of GPUs, at least 1, or remove the line")
    return host, int(slots[1])


def parse(text: str, name: str = "hostfile") -> "list[tuple[str, int]]":
    """Parse a hostfile into [(host, slots), ...] in its order. All processes meet on the first host."""
    hosts: list[tuple[str, int]] = []
    lines: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.split("#")[0].strip()
        if not line:
            continue
        host, slots = parse_line(line, f"{name}, line {number}")
        machine = host.split("@")[-1]
        if machine in lines:
            raise HostfileError(
                f"{name}, line {number}: '{machine}' is already on line {lines[machine]}; write one line per machine"
            )
        lines[machine] = number
        hosts.append((host, slots))
    if not hosts:
        raise HostfileError(f"{name} names no host: {EXAMPLE}")
    local = LOCAL_NAMES & lines.keys()
    if local and len(hosts) > 1:
        word = min(local)
        raise HostfileError(
            f"{name}, line {lines[word]}: the other hosts cannot reach it as '{word}'; write its name or address"
        )
    return hosts


def read(path: str) -> "list[tuple[str, int]]":
    """Read the hostfile at a path: [(host, slots), ...]. Raises HostfileError."""
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
        sys.exit(f"error: {error}")
