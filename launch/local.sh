#!/usr/bin/env bash
set -euo pipefail

usage() {
    cat <<'TEXT'
launch/local.sh [-n NPROC] [-r RESTARTS] [--config FILE]... [key=value]...
    Train on this machine, with NPROC processes.
    -n NPROC      number of ranks (one per GPU, or 2 without GPUs)
    -r RESTARTS   how often to restart failed ranks from the newest checkpoint (0)
    -h, --help    this text
    Environment: PYTHON, the interpreter (.venv/bin/python, else python3); DISTLENET_WARM_START=0 starts each rank in
    a new interpreter, not as a fork of one that has imported everything
TEXT
}
# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

nproc='' restarts=0
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage && exit 0 ;;
        -n) nproc=$(integer "$@"); shift 2 ;;
        -r) restarts=$(integer "$@"); shift 2 ;;
        --config) break ;;
        -*) usage_error "unknown option $1" ;;
        *) break ;;
    esac
done
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # torchrun would set the same, with a warning
exec "$PYTHON" -m distlenet.launch --standalone --nproc-per-node="${nproc:-$(default_ranks)}" \
    --max-restarts="$restarts" -m distlenet.train "$@"
