#!/usr/bin/env bash
# What the batch scripts share; sourced in the project's folder. One task of srun is one rank: train.py reads its place among
# them from Slurm's variables, and Slurm's signal reaches it without a launcher between, which would not know to wait for saving.

. environment/setup.sh
mkdir -p runs

# A rank that waits this long for another gives up: Slurm sees a rank that dies, but not one that hangs.
export HANG_SECONDS=${HANG_SECONDS:-120}
if ! nvidia-smi -L 2>/dev/null | grep -q '^GPU '; then export DS_ACCELERATOR=cpu OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}; fi
if ((${SLURM_GPUS_ON_NODE:-1} > ${SLURM_NTASKS_PER_NODE:-${SLURM_NTASKS:-1}})); then
    say "Note: $SLURM_GPUS_ON_NODE GPUs a node and fewer tasks; each task uses one: --ntasks-per-node=$SLURM_GPUS_ON_NODE"
fi

# train JOB ARGUMENTS...: run the ranks; where they were stopped and have saved (75), put JOB back into the queue.
train() {
    local job=$1 log=runs/slurm-$1-rank follower code=0
    shift
    # The first rank speaks here as well.
    touch "$log-0.log"
    tail -n 0 -F "$log-0.log" &
    follower=$!
    # --wait: when a rank has ended, the others have 30 s. (--kill-on-bad-exit would kill those that leave with 75 a moment
    # later than the first, and srun would report the signal instead.)
    srun --kill-on-bad-exit=0 --wait=30 --open-mode=append --output="$log-%t.log" "$PYTHON" -u train.py "$@" || code=$?
    sleep 1.5
    kill "$follower"
    requeue_if_stopped "$code" "$job"
    if [ "$code" != 0 ] && [ "$code" != 75 ]; then grep -m1 -A15 -E '^(Traceback|error)' "$log"-*.log || true; fi
    exit "$code"
}

# scancel ends the batch script as well, so what was cancelled never comes here.
requeue_if_stopped() {
    if [ "$1" = 75 ]; then scontrol requeue "$2"; fi
}
