#!/usr/bin/env bash
# Train on every machine of the hostfile over plain SSH, after a preflight check of all of them. See docs/cluster.md.
#   ./launch_distributed_train.sh [--check] [--sync] [--measure] [--restarts N] [--hang-seconds S] [arguments of train.py]
#   HOSTFILE=path             another hostfile than the one in this folder
#   MASTER_ADDR, MASTER_PORT  where all processes meet (default: an address of the first host that the others reach, a free port)
#   DRY_RUN=1                 print the command of each host; connect to no host, install nothing
# Every machine needs the project and its Python environment at the same path (--sync copies them).
set -euo pipefail
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

for word in "$@"; do
    case $word in
        -h | --help)    # needs no packages
            "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || . "$here/environment/setup.sh"
            exec "${PYTHON:-python3}" "$here/cluster/run_hosts.py" --help ;;
        --hostfile | --hostfile=*) fail "name another hostfile with HOSTFILE=path" ;;
    esac
done

# 1. Check the hostfile before anything is installed
hostfile=${HOSTFILE:-$here/hostfile}
python=$(command -v "${PYTHON:-python3}" || command -v python3) ||
    fail "python3 is not installed; type: apt-get install python3 python3-venv"
"$python" "$here/cluster/hostfile.py" "$hostfile" >/dev/null || exit 2
[ -n "${DRY_RUN:-}" ] || command -v ssh >/dev/null || fail "ssh is not installed; type: apt-get install openssh-client"

# 2. The Python environment of this machine; the hosts have theirs at the same path
. "$here/environment/setup.sh"
base=""
if [ ! -x "$PYTHON" ]; then    # DRY_RUN made no .venv: another Python prints the commands that name its interpreter
    choose_requirements && PYTHON=$python choose_base_python || exit 1
    export PYTHON
fi

# 3. Start the hosts. With exec, a signal to this script reaches the program that ends the ranks on all machines.
exec "${base:-$PYTHON}" "$here/cluster/run_hosts.py" --hostfile "$hostfile" "$@"
