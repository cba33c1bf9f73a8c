# shellcheck shell=bash
# Shared by the batch scripts. They run from SLURM's spool, so they find this file through $SLURM_SUBMIT_DIR.

MAX_REQUEUES=${MAX_REQUEUES:-10}
restarts=${SLURM_RESTART_COUNT:-0}

# A stop request that arrives before the step has started; run_step forwards it.
stop_requested=''
trap 'stop_requested=1' USR2

# Since SLURM 22.05, srun does not inherit this from sbatch; without it all ranks of a node may share one core.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi

log() { echo "distlenet: $*" >&2; }
die() {
    log "$*"
    exit 1
}

# The words between srun and its command that run the command in the image CONTAINER; none without it. An Apptainer image is
# a file *.sif, any other name is one of pyxis. Both see the submit directory; CONTAINER_MOUNTS adds SOURCE:TARGET,...
container=()
if [ -n "${CONTAINER:-}" ]; then
    mounts=$SLURM_SUBMIT_DIR:$SLURM_SUBMIT_DIR${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}
    case $CONTAINER in
        *.sif)
            container=(apptainer exec --bind "$mounts" --pwd "$SLURM_SUBMIT_DIR")
            if [ -n "${SLURM_GPUS_ON_NODE:-}" ]; then container+=(--nv); fi
            container+=("$CONTAINER") ;;
        *)
            container=("--container-image=$CONTAINER" "--container-mounts=$mounts" "--container-workdir=$SLURM_SUBMIT_DIR") ;;
    esac
fi

# The interpreter: PYTHON if set, else python3 of the container, else the environment that make installs, else python3.
if [ -n "${CONTAINER:-}" ]; then
    PYTHON=${PYTHON:-python3}
else
    PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
    "$PYTHON" -c 'import distlenet.config.schema' 2>/dev/null || "$PYTHON" -c 'import distlenet.config.schema' ||
        die "$PYTHON cannot import distlenet; set PYTHON to the interpreter of its environment, on a disk that all nodes share"
fi

# Print the first host of the job, on which rank 0 runs.
head_host() {
    local hosts
    hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST") || die "scontrol show hostnames $SLURM_JOB_NODELIST failed"
    [ -n "$hosts" ] || die "scontrol show hostnames $SLURM_JOB_NODELIST returned no host"
    echo "${hosts%%$'\n'*}"
}

# Print a port that depends on job and restart, below the ephemeral range (32768 and up).
job_port() { echo $((20000 + (SLURM_JOB_ID * 37 + restarts * 11) % 10000)); }

# run_step COMMAND...: run the only step of the job and exit with its status, so that SLURM shows COMPLETED or FAILED.
# On USR2 (--signal, or scancel -b -s USR2 JOB), let the ranks save, then requeue the job.
run_step() {
    local status=0 step
    # Traps contain only assignments and simple commands: the next signal would interrupt a $(...).
    trap 'log "cancelled: waiting for the ranks to save"' TERM
    "$@" &
    step=$!
    trap 'stop_requested=1; scancel --signal=TERM "$SLURM_JOB_ID.0" || log "the step could not be signalled"' USR2
    if [ -n "$stop_requested" ]; then kill -USR2 $$; fi
    while kill -0 "$step" 2>/dev/null; do wait "$step" || true; done # a trap interrupts wait, not the step
    wait "$step" || status=$?
    if [ -z "$stop_requested" ] || [ "$status" -eq 0 ]; then exit "$status"; fi
    if [ "$restarts" -ge "$MAX_REQUEUES" ]; then
        die "stopped, and not requeued after $restarts requeues (MAX_REQUEUES=$MAX_REQUEUES); submit the job again to resume"
    fi
    log "stopped; requeueing ($((restarts + 1)) of at most $MAX_REQUEUES)"
    scontrol requeue "${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}" ||
        die "scontrol requeue failed; submit the job again to resume"
    exit "$status"
}
