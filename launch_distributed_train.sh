#!/usr/bin/env bash
# Trains on every machine of the hostfile, over plain SSH, after looking whether all of them can. See docs/cluster.md.
#   ./launch_distributed_train.sh [--check] [--sync] [--measure] [--restarts N] [--hang-seconds S] [arguments of train.py]
#   HOSTFILE=path        another hostfile than the one beside this script
#   MASTER_ADDR, MASTER_PORT  where all processes meet (default: an address of the first host that the others reach, a free port)
#   DRY_RUN=1            print what each host would run; reach no host, install nothing
# Every machine needs the project and its environment at the same path (--sync copies them).
set -euo pipefail
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
fail() { printf '%s\n' "$*" >&2; exit 1; }

# 1. The hostfile, before anything is installed
hostfile=${HOSTFILE:-$here/hostfile}
command -v python3 >/dev/null || fail "python3 is not installed: apt-get install python3 python3-venv"
python3 "$here/cluster/hostfile.py" "$hostfile" >/dev/null || exit 2
[ -n "${DRY_RUN:-}" ] || command -v ssh >/dev/null || fail "ssh is not installed: apt-get install openssh-client"

# 2. The environment of this machine; the hosts have theirs at the same path
. "$here/environment/setup.sh"

# 3. The hosts. exec: a signal to this script is then a signal to the one that ends the ranks on all machines.
exec "$PYTHON" "$here/cluster/run_hosts.py" --hostfile "$hostfile" "$@"
