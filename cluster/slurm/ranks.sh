#!/usr/bin/env bash
# Shared by the batch scripts, which source it in the project's folder. One task of srun is one rank: train.py reads its rank
# from Slurm's variables. Slurm's signal reaches it directly; a launcher in between would not wait for the checkpoint.

. environment/setup.sh
mkdir -p runs

# Seconds that a rank waits for another before it fails: Slurm notices a rank that dies, but not one that hangs.
export HANG_SECONDS=${HANG_SECONDS:-120}
if ! nvidia-smi -L 2>/dev/null | grep -q '^GPU '; then export DS_ACCELERATOR=cpu; fi

# train JOB ARGUMENTS...: run the ranks; if they were stopped, and have saved if training had begun, requeue JOB.
train() {
    local job=$1 log=runs/slurm-$1-rank follower code=0 word words=() stop_at=""
    export RUN_BEGUN=runs/slurm-$1-begun    # train.py makes this file once its run folder is ready
    shift
    if ((${SLURM_GPUS_ON_NODE:-1} > ${SLURM_NTASKS_PER_NODE:-${SLURM_NTASKS:-1}})); then
        say "Note: fewer tasks than the $SLURM_GPUS_ON_NODE GPUs per node; each task uses one GPU: add --ntasks-per-node=$SLURM_GPUS_ON_NODE"
    fi
    ((${SLURM_RESTART_COUNT:-0})) || rm -f "$RUN_BEGUN"    # of another job that had this number
    # A requeued job resumes: --fresh counts until the job has begun its run.
    for word in "$@"; do
        if [ "$word" != --fresh ] || [ ! -e "$RUN_BEGUN" ]; then words+=("$word"); fi
        case $word in --stop-at | --stop-at=*) stop_at=1 ;; esac
    done
    # On CPUs, tasks must not share cores, and waiting threads must not spin. Not for compare.py, which divides the cores of
    # the node itself.
    if [ "${DS_ACCELERATOR:-}" = cpu ]; then
        export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}} OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
    fi
    # Show the first rank's output here as well.
    touch "$log-0.log"
    tail -n 0 -F "$log-0.log" &
    follower=$!
    # --wait: after the first rank has ended, the others have 30 s. --kill-on-bad-exit would kill ranks that exit with 75 a
    # moment after the first, and srun would report the signal instead.
    # srun does not inherit --cpus-per-task from sbatch (since Slurm 22.05).
    srun ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} --kill-on-bad-exit=0 --wait=30 --open-mode=append \
        --output="$log-%t.log" "$PYTHON" -u train.py "${words[@]}" || code=$?
    sleep 1.5
    kill "$follower"
    # With --stop-at, 75 also says that the step was reached, and a requeued job would train on to the end.
    if [ -z "$stop_at" ] || [ "$code" != 75 ]; then requeue_if_stopped "$code" "$job"; fi
    case $code in 0 | 75 | 143) ;; *) grep -m1 -A15 -E '^(Traceback|error)' "$log"-*.log || true ;; esac
    exit "$code"
}

# 143: SIGTERM came while a rank was still loading PyTorch. scancel ends the batch script as well, so a canceled job never
# gets here.
requeue_if_stopped() {
    if [ "$1" = 75 ] || [ "$1" = 143 ]; then scontrol requeue "$2"; fi
}
