# shellcheck shell=bash
# What the batch scripts share. They run in SLURM's spool, so they find this file through the folder of submission.

MAX_REQUEUES=${MAX_REQUEUES:-10}
restarts=${SLURM_RESTART_COUNT:-0}

# Asked to stop before there is a step to be told: run_step passes it on.
asked=''
trap 'asked=1' USR2

# srun does not take this from sbatch (since SLURM 22.05); without it all ranks of a node may share one core.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi

say() { echo "distlenet: $*" >&2; }
die() {
    say "$*"
    exit 1
}

# The interpreter: PYTHON, else the environment that make has installed, else what the PATH has.
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
"$PYTHON" -c 'import distlenet.config.schema' 2>/dev/null || "$PYTHON" -c 'import distlenet.config.schema' ||
    die "$PYTHON cannot import distlenet; set PYTHON to the interpreter of its environment, on a disk of all nodes"

# The first host of the job, where rank 0 is.
head_host() {
    local hosts
    hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST") || die "scontrol show hostnames $SLURM_JOB_NODELIST failed"
    [ -n "$hosts" ] || die "scontrol show hostnames $SLURM_JOB_NODELIST named no host"
    echo "${hosts%%$'\n'*}"
}

# A port of this job and start alone, below the ephemeral range (32768 and up).
job_port() { echo $((20000 + (SLURM_JOB_ID * 37 + restarts * 11) % 10000)); }

# run_step COMMAND...: run the job's one step. Asked to stop by USR2 (--signal, or scancel -b -s USR2 JOB), have the
# ranks save, then requeue. Exits with the step's status; SLURM sees COMPLETED or FAILED by it.
run_step() {
    local status=0 step
    # Only assignments and single commands in traps: a $(...) there would be interrupted by the next signal.
    trap 'say "cancelled: waiting for the ranks to save"' TERM
    "$@" &
    step=$!
    trap 'asked=1; scancel --signal=TERM "$SLURM_JOB_ID.0" || say "the step could not be told"' USR2
    if [ -n "$asked" ]; then kill -USR2 $$; fi
    while kill -0 "$step" 2>/dev/null; do wait "$step" || true; done # a trap ends a wait, not the step
    wait "$step" || status=$?
    if [ -z "$asked" ] || [ "$status" -eq 0 ]; then exit "$status"; fi
    if [ "$restarts" -ge "$MAX_REQUEUES" ]; then
        die "stopped as asked, and not requeued: it was $restarts times (MAX_REQUEUES=$MAX_REQUEUES); submit it again to go on"
    fi
    say "stopped as asked; requeueing, for the $((restarts + 1)). time of at most $MAX_REQUEUES"
    scontrol requeue "${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}" ||
        die "scontrol requeue failed; submit the job again to go on"
    exit "$status"
}
