#!/usr/bin/env bash
# LAUNCHER=pdsh: DeepSpeed's own runner instead of cluster/run_hosts.py, to compare with. Sourced by launch_distributed_train.sh.
# It starts the hosts with pdsh and has none of: the preflight, the end of hung or cut-off ranks, restarts, logs a host.

[[ $here$PWD != *[[:space:]]* ]] || fail "DeepSpeed cannot start on other machines in a folder whose name has a space: $here, $PWD"
hosts=$(python3 "$here/cluster/hostfile.py" "$hostfile") || exit 2
first=${hosts%% *}

# Where the processes meet: what SSH makes of the first host's name, for `node1` may be a nickname in ~/.ssh/config
if [ -z "${MASTER_ADDR:-}" ]; then
    MASTER_ADDR=$(ssh -G "$first" 2>/dev/null | sed -n 's/^hostname //p') || true
    MASTER_ADDR=${MASTER_ADDR:-${first#*@}}
fi

# The arguments pass through a shell on the other machines. DeepSpeed puts those with a space between double quotes (and
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
exec "${command[@]}"
