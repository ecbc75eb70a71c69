#!/usr/bin/env bash
# Trains on this machine: on every GPU in it, or on the CPU when there is none. All arguments go to train.py.
#   ./launch_local_train.sh [arguments of train.py]
#   NUM_PROCS=2            number of processes (default: one a GPU; on the CPU what is faster, see training/cpu_processes.py)
#   CUDA_VISIBLE_DEVICES=  which GPUs; empty: none          DS_ACCELERATOR=cpu  the CPU although there are GPUs
#   MASTER_PORT=29500      where the processes meet (default: a free port)
#   DRY_RUN=1              print the command, run nothing, install nothing
# Relative paths among the arguments mean what they mean where you stand: the script changes no folder.
set -euo pipefail
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
. "$here/environment/setup.sh"

case ${1:-} in -h | --help)
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
    echo
    exec "$PYTHON" "$here/train.py" --help ;;
esac

# 1. The devices, one process each
devices=()
if [ "${DS_ACCELERATOR:-}" != cpu ]; then
    num_gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true)
    mapfile -t devices < <(seq 0 $((num_gpus - 1)))
    if [ "$num_gpus" -gt 0 ] && [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        IFS=', ' read -ra devices <<<"$CUDA_VISIBLE_DEVICES"
        [ "${devices[0]:-}" != -1 ] || devices=()
        for device in "${devices[@]}"; do    # a number, or a name such as GPU-8f3a or MIG-1c2d
            if [[ $device =~ ^-?[0-9]+$ ]] && ! ((device >= 0 && device < num_gpus)); then
                say "CUDA_VISIBLE_DEVICES names the GPU $device, and this machine has the GPUs 0 to $((num_gpus - 1))."
                exit 2
            fi
        done
    fi
fi
num_procs=${NUM_PROCS:-${#devices[@]}}
if [ -z "${NUM_PROCS:-}" ] && [ ${#devices[@]} -eq 0 ]; then
    choose='from training.cpu_processes import main; main()'
    read -r num_procs why < <(PYTHONPATH=$here "$PYTHON" -c "$choose" "$@" 2>/dev/null || echo "1 one process")
    say "No GPU found: training on the CPU, $why (NUM_PROCS chooses another number)."
elif [ ${#devices[@]} -eq 0 ]; then
    say "No GPU found: training on the CPU."
fi
[[ $num_procs =~ ^[1-9][0-9]*$ ]] || { say "NUM_PROCS must be a whole number of at least 1, not '$num_procs'."; exit 2; }

environment=()
if [ ${#devices[@]} -eq 0 ]; then
    mapfile -t devices < <(seq 0 $((num_procs - 1)))
    # Threads of the processes must not fight for the cores: two processes with a thread per core each were 40 times slower.
    threads=$(($(env -u OMP_NUM_THREADS nproc) / num_procs))
    # Threads that wait must not spin: on cores that others want too, two of them were five times slower.
    environment=(env DS_ACCELERATOR=cpu "OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}" "OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}")
elif ((num_procs > ${#devices[@]})); then
    say "NUM_PROCS=$num_procs, but only ${#devices[@]} GPU(s) can be used: each process needs one of its own."
    exit 2
fi

# 2. The command. This is the half of DeepSpeed's launcher that runs on each machine. `deepspeed train.py` would start it in
# turn, after loading torch once more (1.5 s), would look for /job/hostfile, and dies of a signal without telling the ranks.
world=$(printf '"%s",' "${devices[@]:0:num_procs}")
world=$(printf '{"localhost":[%s]}' "${world%,}" | base64 -w0)
command=("${environment[@]}" "$PYTHON" -u -m deepspeed.launcher.launch --log_level=critical --no_local_rank "--world_info=$world"
    --master_addr=127.0.0.1 "--master_port=${MASTER_PORT:-$(free_port)}" "$here/train.py" "$@")

if [ -n "${DRY_RUN:-}" ]; then
    line=$(printf '%q ' "${command[@]}")
    printf '%s\n' "${line% }"
    exit 0
fi

# 3. Run it, and pass signals on. The launcher gets a process group of its own, so that a Ctrl-C in the terminal reaches this
# script alone and the ranks exactly once. A signal goes to the ranks, not to the launcher: that would stop one rank after the
# other and kill each after 30 s, while all of them together need to save. It ends by itself when they do.
stopped_at=0 signal=0 seconds_to_save=120
stop() {
    if ((signal == 0)); then
        signal=$1 stopped_at=$SECONDS
        say "Stopping: training saves its state first (a second Ctrl-C ends it in any case)."
        local pid children=() ranks=()
        read -ra children 2>/dev/null <"/proc/$launcher/task/$launcher/children" || true
        for pid in "${children[@]}"; do
            if grep -qsF "$here/train.py" "/proc/$pid/cmdline"; then ranks+=("$pid"); fi
        done
        kill -TERM "${ranks[@]:-$launcher}" 2>/dev/null || true
    elif ((SECONDS - stopped_at >= 2)); then    # not the echo that `timeout` sends to the whole group
        kill -TERM "$launcher" 2>/dev/null || true
    fi
}
# setpriv: should this script itself be killed, the kernel tells the launcher, which then ends the ranks.
if command -v setpriv >/dev/null; then command=(setpriv --pdeathsig TERM "${command[@]}"); fi
set -m
"${command[@]}" </dev/null &
launcher=$!
set +m
trap 'stop 1' HUP
trap 'stop 2' INT
trap 'stop 15' TERM

code=0
wait "$launcher" || code=$?    # a signal ends this wait early
while kill -0 "$launcher" 2>/dev/null; do
    if ((signal && SECONDS - stopped_at > seconds_to_save)); then kill -TERM "$launcher" 2>/dev/null || true; fi
    sleep 0.2 || true
done
if ((signal)); then
    code=0
    wait "$launcher" || code=$?
    # 241: a rank that was still importing died of the signal
    if ((code == 0 || code == 241)); then code=$((128 + signal)); fi
fi
# A launcher that was killed leaves its ranks behind; a healthy one has left none.
if kill -TERM -- "-$launcher" 2>/dev/null; then
    say "The launcher is gone: ending the ranks it left."
    for ((tenths = 0; tenths < 300; tenths++)); do
        kill -0 -- "-$launcher" 2>/dev/null || break
        sleep 0.1
    done
    kill -KILL -- "-$launcher" 2>/dev/null || true
fi
# 75: training stopped where it was told to, and saved
((code == 0 || code == 75 || signal)) || say "Training failed (exit code $code)."
exit "$code"
