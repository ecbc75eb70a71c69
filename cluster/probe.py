"""Report one host's state to the preflight: code, Python environment, GPUs, data, disk space, addresses and clock.

    python3 cluster/probe.py '{"project": "/path/of/project", "python": "/path/of/python", "data": "/path/of/data"}'

Prints one line, `probe:` and JSON. The preflight sends this file over SSH to a bare `python3 -`, because the project
may not be there yet. So it uses only the standard library of Python 3.6, and whatever is missing is reported, not
raised.
"""

import fcntl
import getpass
import hashlib
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import time

CODE = (".py", ".sh", ".toml", ".json", ".txt")
IMPORTABLE = (".py", ".pyc", ".so")  # a file of these kinds that only one host has can shadow a module
# Folders at the top of the project, next to hidden ones, that hold no code of training.
NOT_CODE = {"data", "runs", "results", "tests", "docs", "benchmarks", "__pycache__"}
GIVEN_FILE_LIMIT = 2**30  # bytes; of larger files only the size is compared
LINE_LIMIT = 2**13  # bytes of the longest line of a file list: a path, which Linux limits to 4096, and a label
# Run by the project's interpreter. Reads the metadata of packages, since importing torch would take seconds.
ENVIRONMENT = """
import json, os, platform, sys
from importlib import metadata
if os.path.exists(os.path.join(sys.prefix, "installing")):  # environment/setup.sh was interrupted
    sys.exit("unfinished")
found = {"python": platform.python_version(), "prefix": sys.prefix}
for name in ("torch", "deepspeed", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "nvidia-dali-cuda110", "numpy"):
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        continue
    found["dali" if "dali" in name else name] = version
    if name == "torch":
        path = metadata.distribution(name).locate_file("torch/version.py")
        space = {}
        exec(open(path).read(), space)
        found["cuda"] = space.get("cuda") or "none"
print(json.dumps(found))
"""
GPU_QUERY = "index,name,memory.total,memory.free,driver_version"


def start(words):
    """Start a program whose output is read later; None if it is not installed."""
    try:
        return subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True
        )
    except OSError:
        return None


def output(process, seconds):
    """The output of a started program; empty if it failed or took longer than `seconds`."""
    if process is None:
        return ""
    try:
        text = process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        return ""
    return text if process.returncode == 0 else ""


def digest_of(path, limit=None):
    """Shortened SHA-256 of a file; for a file above `limit` bytes, its size."""
    if limit is not None and os.path.getsize(path) > limit:
        return f"{os.path.getsize(path)} bytes"
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(2**20), b""):
            sha.update(block)
    return sha.hexdigest()[:16]


def code_of(project, skip=()):
    """{path: digest} of the files that training runs on; `skip` are folders of runs or data inside the project."""
    found = {}
    skip = {os.path.realpath(folder) for folder in skip}
    for folder, folders, names in os.walk(project):
        top = folder == project
        folders[:] = [
            name
            for name in folders
            if name[0] != "."
            and name != "__pycache__"
            and not (top and name in NOT_CODE)
            and os.path.realpath(os.path.join(folder, name)) not in skip
            and not os.path.exists(os.path.join(folder, name, "pyvenv.cfg"))  # a virtual environment of another name
        ]
        for name in names:
            if name.endswith(CODE + IMPORTABLE):
                path = os.path.join(folder, name)
                try:
                    found[os.path.relpath(path, project)] = digest_of(path)
                except OSError:
                    continue
    return found


def given_of(paths):
    """{path: digest} of the files of the command line that this host has and may read."""
    found = {}
    for path in paths:
        try:
            found[path] = digest_of(path, GIVEN_FILE_LIMIT)
        except OSError:
            continue
    return found


def identity():
    """A text that differs between machines and between containers: one machine may have two names in a hostfile."""
    parts = []
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            parts.append(file.read().strip())
        for kind in ("net", "mnt"):
            parts.append(os.readlink("/proc/self/ns/" + kind))
    except OSError:
        return ""
    return " ".join(parts)


def commit_of(project):
    """The checked-out commit, empty if there is none. Read from .git itself, because git may not be installed."""

    def read(*names):
        with open(os.path.join(*names)) as file:
            return file.read().strip()

    git = os.path.join(project, ".git")
    try:
        if os.path.isfile(git):  # a worktree has its own HEAD and shares the branches
            git = os.path.join(project, read(git)[len("gitdir: ") :])
        common = os.path.join(git, read(git, "commondir")) if os.path.exists(os.path.join(git, "commondir")) else git
        head = read(git, "HEAD")
        if not head.startswith("ref: "):
            return head
        reference = head[len("ref: ") :]
        try:
            return read(common, reference)
        except OSError:
            lines = [line.split() for line in read(common, "packed-refs").splitlines()]
            return next((line[0] for line in lines if line[1:] == [reference]), "")
    except OSError:
        return ""


def data_of(folder):
    """What reveals another or an incomplete copy of a prepared dataset; None if there is none."""
    try:
        with open(os.path.join(folder, "dataset.json")) as file:
            facts = json.load(file)
        found = {"fingerprint": facts["fingerprint"], "missing": missing_images(folder, facts)}
    except (OSError, ValueError, KeyError):
        return None
    sizes = found["sizes"] = {}
    for name in ("labels.txt", "training_file_list.txt", "test_file_list.txt", "packed/train.npy", "packed/test.npy"):
        path = os.path.join(folder, name)
        sizes[name] = os.path.getsize(path) if os.path.exists(path) else None
    return found


def missing_images(folder, facts):
    """The first and last listed images that do not exist, if training reads image files, which may lie elsewhere."""
    missing = []
    for name in () if facts["packed"] else ("training_file_list.txt", "test_file_list.txt"):
        path = os.path.join(folder, name)
        if not os.path.exists(path):  # its size is compared
            continue
        with open(path, "rb") as file:
            lines = [file.readline()]
            file.seek(max(0, os.path.getsize(path) - LINE_LIMIT))
            lines += file.read().splitlines()[-1:]
        for line in lines:
            image = os.path.join(folder, facts["root"], os.fsdecode(line.rpartition(b"\t")[0]))
            if not os.path.exists(image):
                missing.append(os.path.normpath(os.path.join(os.path.realpath(folder), image)))
    return missing


def gpus_of(text):
    """Parse the answer of nvidia-smi: [{index, name, total, free, driver}], memory in MiB."""
    gpus = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == 5:
            total, free = (int(cell) if cell.isdigit() else None for cell in cells[2:4])
            gpus.append({"index": cells[0], "name": cells[1], "total": total, "free": free, "driver": cells[4]})
    return gpus


def addresses():
    """[(network interface, IPv4 address)] of all interfaces that have one, except the loopback."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(
                    any_socket.fileno(), 0x8915, struct.pack("256s", name.encode()[:15])
                )  # SIOCGIFADDR
            except OSError:
                continue
            address = socket.inet_ntoa(answer[20:24])
            if not address.startswith("127."):
                found.append((name, address))
    return found


def room(folder):
    """Free disk space in GB where a folder is or will be."""
    while folder and not os.path.exists(folder):
        folder = os.path.dirname(folder)
    try:
        return round(shutil.disk_usage(folder or "/").free / 1e9, 1)
    except OSError:
        return None


def answer(request):
    """Everything the preflight checks on this host; `request` names the paths to check."""
    gpus = start(["nvidia-smi", "--query-gpu=" + GPU_QUERY, "--format=csv,noheader,nounits"])
    python = start([request["python"], "-c", ENVIRONMENT])
    project = request["project"]
    facts = {
        "hostname": socket.gethostname(),
        "identity": identity(),
        "user": getpass.getuser(),
        "project": os.path.isdir(project),
        "cwd": os.path.isdir(request.get("cwd", "/")),
        "commit": commit_of(project),
        "code": code_of(project, [request[name] for name in ("runs", "data") if request.get(name)]),
        "data": data_of(request["data"]) if request.get("data") else None,
        "given": given_of(request.get("given", [])),
        "disk": room(request.get("runs", project)),
        "shm": room("/dev/shm") if os.path.isdir("/dev/shm") else None,
        "cores": len(os.sched_getaffinity(0)),
        "addresses": addresses(),
        "rsync": shutil.which("rsync") is not None,
    }
    facts["gpus"] = gpus_of(output(gpus, 15))
    try:
        facts["environment"] = json.loads(output(python, 15) or "null")
    except ValueError:
        facts["environment"] = None
    facts["time"] = time.time()  # last, because the clock check compares it with the time of arrival
    return facts


if __name__ == "__main__":
    print("probe:" + json.dumps(answer(json.loads(sys.argv[1]))), flush=True)
