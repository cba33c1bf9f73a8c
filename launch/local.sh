#!/usr/bin/env bash
set -euo pipefail

usage() {
    cat <<'TEXT'
launch/local.sh [-n NPROC] [-r RESTARTS] [--config FILE]... [key=value]...
    Train on this machine, with NPROC processes.
    -n NPROC      ranks to start (one for every GPU, or else 2)
    -r RESTARTS   how often ranks that die are started again, from the newest checkpoint (0)
    -h, --help    this text
    Environment: PYTHON, the interpreter (.venv/bin/python, else python3)
TEXT
}
# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

nproc='' restarts=0
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage && exit 0 ;;
        -n) nproc=$(whole_number "$@"); shift 2 ;;
        -r) restarts=$(whole_number "$@"); shift 2 ;;
        --config) break ;;
        -*) refuse "unknown option $1" ;;
        *) break ;;
    esac
done
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # as distlenet and torchrun do where nothing is said; torchrun with a warning
exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node="${nproc:-$(ranks_here)}" \
    --max-restarts="$restarts" -m distlenet.train "$@"
