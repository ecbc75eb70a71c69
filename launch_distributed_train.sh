#!/usr/bin/env bash
# Trains on every machine of the hostfile, over SSH. All arguments go to train.py.
#   ./launch_distributed_train.sh [arguments of train.py]
#   HOSTFILE=path        another hostfile than the one beside this script
#   MASTER_ADDR, MASTER_PORT  where all processes meet (default: the first host, a port that is free here)
#   DRY_RUN=1            print the command after checking the hostfile; reach no host, install nothing
# Every machine needs the project and its environment at the same path, and the folder you stand in.
set -euo pipefail
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
fail() { printf '%s\n' "$*" >&2; exit 1; }

# 1. The hostfile. DeepSpeed would train on this machine alone when the file is missing, and misread some lines.
hostfile=${HOSTFILE:-$here/hostfile}
command -v python3 >/dev/null || fail "python3 is not installed: apt-get install python3 python3-venv"
hosts=$(python3 "$here/cluster/hostfile.py" "$hostfile") || exit 1
mapfile -t hosts < <(cut -d' ' -f1 <<<"$hosts")
[[ $here$PWD != *[[:space:]]* ]] || fail "DeepSpeed cannot start on other machines in a folder whose name has a space: $here, $PWD"

# 2. The hosts, all at once: DeepSpeed itself tries the first only, and the others would be waited for, for ten minutes
if [ -z "${DRY_RUN:-}" ]; then
    command -v ssh >/dev/null || fail "ssh is not installed: apt-get install openssh-client"
    command -v pdsh >/dev/null || fail "pdsh is not installed, and DeepSpeed starts the other machines with it: apt-get install pdsh"
    answers=()
    for host in "${hosts[@]}"; do
        ssh -n -o BatchMode=yes -o ConnectTimeout=5 "$host" true 2>/dev/null &
        answers+=($!)
    done
    unreachable=()
    for i in "${!hosts[@]}"; do wait "${answers[i]}" || unreachable+=("${hosts[i]}"); done
    [ ${#unreachable[@]} -eq 0 ] || fail "No answer over SSH from ${unreachable[*]}: 'ssh ${unreachable[0]} true' must work without asking for a password."
fi

. "$here/setup_environment.sh"

# 3. Where the processes meet: what SSH makes of the first host's name, for `node1` may be a nickname in ~/.ssh/config
if [ -z "${MASTER_ADDR:-}" ]; then
    MASTER_ADDR=$(ssh -G "${hosts[0]}" 2>/dev/null | sed -n 's/^hostname //p') || true
    MASTER_ADDR=${MASTER_ADDR:-${hosts[0]#*@}}
fi

# 4. The arguments pass through a shell on the other machines. DeepSpeed puts those with a space between double quotes (and
# escapes nothing but a double quote), leaves the others bare, and pdsh replaces %h, %n and %u.
arguments=()
for argument in "$@"; do
    argument=${argument//%/%%}
    if [[ $argument == *' '* ]]; then
        argument=${argument//\\/\\\\} argument=${argument//\$/\\\$} argument=${argument//\`/\\\`}
    else
        printf -v argument %q "$argument"
    fi
    arguments+=("$argument")
done

# --force_multi: over SSH even when the hostfile names one machine, which need not be this one.
command=("$PYTHON" -m deepspeed.launcher.runner --hostfile "$(readlink -f "$hostfile")" --force_multi --no_local_rank
    --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-$(free_port)}" "$here/train.py" "${arguments[@]}")
if [ -n "${DRY_RUN:-}" ]; then
    line=$(printf '%q ' "${command[@]}")
    printf '%s\n' "${line% }"
    exit 0
fi
# exec: a signal to this script is then a signal to DeepSpeed's runner, which ends the ranks on all machines.
exec "${command[@]}"
