#!/usr/bin/env bash
# Train on this machine: on every GPU, or on the CPU without one. All arguments are passed to train.py.
#   ./launch_local_train.sh [arguments of train.py]
#   NUM_PROCS=2            number of processes (default: one per GPU; on the CPU see training/cpu_processes.py)
#   CUDA_VISIBLE_DEVICES=  GPUs to use; empty: none         DS_ACCELERATOR=cpu  use the CPU even if there are GPUs
#   MASTER_PORT=29500      port where the processes meet (default: a free port)
#   SAVE_SECONDS=600       time for the processes to save after Ctrl-C or SIGTERM (default: 600)
#   DRY_RUN=1              print the command; run and install nothing
# Relative paths among the arguments refer to the current folder; the script does not change it.
set -euo pipefail
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")

for word in "$@"; do
    case $word in -h | --help)    # needs no packages
        sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
        echo
        "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || . "$here/environment/setup.sh"
        exec "${PYTHON:-python3}" "$here/train.py" --help ;;
    esac
done
. "$here/environment/setup.sh"
for word in "$@"; do    # without a launcher, so that they are printed once
    [ "$word" != --list-settings ] || exec "$PYTHON" "$here/train.py" "$@"
done

# 1. The devices, one process per device
devices=()
if [ "${DS_ACCELERATOR:-}" != cpu ]; then
    num_gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true)
    mapfile -t devices < <(seq 0 $((num_gpus - 1)))
    if [ "$num_gpus" -gt 0 ] && [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        IFS=', ' read -ra devices <<<"$CUDA_VISIBLE_DEVICES"
        [ "${devices[0]:-}" != -1 ] || devices=()
        for device in "${devices[@]}"; do    # a number, or a name such as GPU-8f3a or MIG-1c2d
            if [[ $device =~ ^-?[0-9]+$ ]] && ! ((device >= 0 && device < num_gpus)); then
                say "error: CUDA_VISIBLE_DEVICES names the GPU $device, but this machine has the GPUs 0 to $((num_gpus - 1))."
                exit 2
            fi
        done
    fi
fi
num_procs=${NUM_PROCS:-${#devices[@]}}
if [ -z "${NUM_PROCS:-}" ] && [ ${#devices[@]} -eq 0 ]; then
    # With -c, Python would import the config.py or common/ of the current folder before those of the project.
    choose='import sys; sys.path[0] = sys.argv.pop(1); from training.cpu_processes import main; main()'
    python=$PYTHON
    [ -x "$python" ] || python=python3    # DRY_RUN made no .venv
    read -r num_procs why < <("$python" -c "$choose" "$here" "$@" 2>/dev/null || echo "1 one process")
    say "No GPU found: training on the CPU, $why (NUM_PROCS chooses another number)."
elif [ ${#devices[@]} -eq 0 ]; then
    say "No GPU found: training on the CPU."
fi
[[ $num_procs =~ ^[1-9][0-9]*$ ]] || { say "error: NUM_PROCS must be a whole number of at least 1, not '$num_procs'."; exit 2; }

save_seconds=${SAVE_SECONDS:-600}
[[ $save_seconds =~ ^[1-9][0-9]*$ ]] || { say "error: SAVE_SECONDS must be a whole number of at least 1, not '$save_seconds'."; exit 2; }

port=${MASTER_PORT:-$(free_port)}
if ! [[ $port =~ ^[1-9][0-9]{3,4}$ ]] || ((port < 1024 || port > 65535)); then
    say "error: MASTER_PORT must be a port number from 1024 to 65535, not '$port'."
    exit 2
fi

environment=()
if [ ${#devices[@]} -eq 0 ]; then
    mapfile -t devices < <(seq 0 $((num_procs - 1)))
    # The processes must not share cores: two processes with one thread per core each were 40 times slower.
    threads=$(($(env -u OMP_NUM_THREADS nproc) / num_procs))
    # Waiting threads must not spin: on busy cores, two processes with spinning threads were five times slower.
    environment=(env DS_ACCELERATOR=cpu "OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"
        "OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}")
elif ((num_procs > ${#devices[@]})); then
    say "error: NUM_PROCS=$num_procs, but only ${#devices[@]} GPU(s) can be used: each process needs its own GPU."
    exit 2
fi

# 2. The command: the part of DeepSpeed's launcher that runs on each machine. `deepspeed train.py` would start it after
# loading torch once more (1.5 s), would look for /job/hostfile, and dies of a signal without notifying the ranks.
world=$(printf '"%s",' "${devices[@]:0:num_procs}")
world=$(printf '{"localhost":[%s]}' "${world%,}" | base64 -w0)
command=("${environment[@]}" "$PYTHON" -u -m deepspeed.launcher.launch --log_level=critical --no_local_rank "--world_info=$world"
    --master_addr=127.0.0.1 "--master_port=$port" "$here/train.py" "$@")

if [ -n "${DRY_RUN:-}" ]; then
    line=$(printf '%q ' "${command[@]}")
    printf '%s\n' "${line% }"
    exit 0
fi

# 3. Run it, and forward signals. The launcher gets its own process group, so that a Ctrl-C in the terminal reaches this
# script alone, and the ranks exactly once. A signal goes to the ranks, not to the launcher: the launcher would stop one
# rank after the other and kill each after 30 s, but they need to save together. It exits when they have exited.
stopped_at=0 signal=0 killed=""
# End the launcher and the ranks at once; they share its process group. SIGTERM would not do: the launcher passes it on to
# the ranks, waits 30 s for each, and starts over at the next one.
end_all() {
    [ -n "$killed" ] || say "$1"
    killed=1
    kill -KILL -- "-$launcher" 2>/dev/null || true
}
stop() {
    if ((signal == 0)); then
        signal=$1 stopped_at=$SECONDS
        say "Stopping: training saves its state first, if it has begun; that may take $save_seconds s (a second Ctrl-C ends it at once)."
        local pid children=() ranks=()
        read -ra children 2>/dev/null <"/proc/$launcher/task/$launcher/children" || true
        for pid in "${children[@]}"; do
            if grep -qsF "$here/train.py" "/proc/$pid/cmdline"; then ranks+=("$pid"); fi
        done
        kill -TERM "${ranks[@]:-$launcher}" 2>/dev/null || true
    elif ((SECONDS - stopped_at >= 2)); then    # not the second signal that `timeout` sends to the whole group
        end_all "Ending the processes at once."
    fi
}
# setpriv: if this script is killed, the kernel sends SIGTERM to the launcher, which then ends the ranks.
if command -v setpriv >/dev/null; then command=(setpriv --pdeathsig TERM "${command[@]}"); fi
set -m
"${command[@]}" </dev/null &
launcher=$!
set +m
trap 'stop 1' HUP
trap 'stop 2' INT
trap 'stop 15' TERM

code=0
wait "$launcher" || code=$?    # a signal interrupts this wait
while kill -0 "$launcher" 2>/dev/null; do
    if ((signal && SECONDS - stopped_at > save_seconds)); then
        end_all "The processes have not saved within $save_seconds s: ending them."
    fi
    sleep 0.2 || true
done
if ((signal)); then code=0; wait "$launcher" || code=$?; fi
was_killed=$((code > 128 && code < 193))    # 128 plus a signal: the launcher itself
if ((signal)); then
    # 241: a rank that was still importing was ended by the signal; 143: the launcher itself was
    if ((code == 241 || code == 143)); then say "Stopped before training began; there was nothing to save."; fi
    if ((code == 0 || code == 241)); then code=$((128 + signal)); fi
fi
# A killed launcher leaves its ranks behind. After one that exited normally, only helpers of the ranks may still be ending.
if ((was_killed)) && [ -z "$killed" ] && kill -TERM -- "-$launcher" 2>/dev/null; then
    say "The launcher was killed: ending the ranks that it left."
    for ((tenths = 0; tenths < 300; tenths++)); do
        kill -0 -- "-$launcher" 2>/dev/null || break
        sleep 0.1
    done
    kill -KILL -- "-$launcher" 2>/dev/null || true
fi
# 75: training stopped on request, and saved. 2: wrong arguments, or the run is finished: nothing was changed.
if ((code == 0 || code == 75 || code == 2 || signal)); then exit "$code"; fi
if ((code > 192)); then    # 256 minus the signal that ended a rank
    name=$(kill -l $((256 - code)) 2>/dev/null || true)
    say "Training failed: a process was ended by signal $((256 - code)) ($name)$([ "$name" != KILL ] || echo '; was the memory full?')"
else
    say "Training failed (exit code $code)."
fi
exit "$code"
