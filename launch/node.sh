#!/usr/bin/env bash
set -euo pipefail

usage() {
    cat <<'TEXT'
launch/node.sh --nodes N|MIN:MAX --head HOST [options] [--config FILE]... [key=value]...
    Train on several machines: run the same command on each. The run directory (run.dir) is on a disk that all share
    or in an object store.
    --nodes N         number of machines; MIN:MAX for an elastic job, which continues when machines leave or join
    --head HOST       name or address of the machine that runs the rendezvous; an elastic job ends with it
    --port PORT       port of the rendezvous (29400); different for each job that runs at the same time
    --id NAME         name of the job: the same on all machines, different for each job (distlenet)
    --interface NAME  network interface between the machines, such as eth0, if they have several
    -n NPROC          ranks on this machine (one per GPU, or 2 without GPUs)
    -r RESTARTS       how often to restart after a rank fails or machines leave or join (0; 100 with MIN:MAX)
    -h, --help        this text
    Environment: PYTHON, the interpreter (.venv/bin/python, else python3); DISTLENET_WARM_START=0 starts each rank in
    a new interpreter, not as a fork of one that has imported everything
TEXT
}
# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

nodes='' head='' port=29400 id=distlenet interface='' nproc='' restarts='' elastic=()
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage && exit 0 ;;
        --nodes) nodes=$(argument "$@"); shift 2 ;;
        --head) head=$(argument "$@"); shift 2 ;;
        --port) port=$(integer "$@"); shift 2 ;;
        --id) id=$(argument "$@"); shift 2 ;;
        --interface) interface=$(argument "$@"); shift 2 ;;
        -n) nproc=$(integer "$@"); shift 2 ;;
        -r) restarts=$(integer "$@"); shift 2 ;;
        --config) break ;;
        -*) usage_error "unknown option $1" ;;
        *) break ;;
    esac
done
[ -n "$nodes" ] || usage_error "--nodes is missing: give the number of machines, such as --nodes 2"
[ -n "$head" ] || usage_error "--head is missing: give the machine that runs the rendezvous, such as --head $(hostname)"
[[ $nodes =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]] || usage_error "--nodes $nodes: expected N or MIN:MAX, such as 2 or 1:4"
if [[ $nodes == *:* ]]; then
    [ "${nodes%:*}" -le "${nodes#*:}" ] || usage_error "--nodes $nodes: MIN is larger than MAX"
    restarts=${restarts:-100} elastic=(distributed.allow_uneven_batches=true)
    # With a shared store, machines that join in a later round do not learn its address (seen with torch 2.15).
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
fi
if [ -n "$interface" ]; then
    [ -e "/sys/class/net/$interface" ] ||
        usage_error "--interface $interface: this machine has $(cd /sys/class/net && echo * | sed 's/ /, /g')"
    export GLOO_SOCKET_IFNAME=$interface NCCL_SOCKET_IFNAME=$interface
fi
addresses=$(getent ahosts "$head" | cut -d' ' -f1 | sort -u) || usage_error "--head $head: the name cannot be resolved"

# torchrun recognises the head only by its name, not by an address, so set is_host explicitly.
conf=is_host=false
for address in $addresses; do
    case $address in 127.* | ::1) conf=is_host=true ;; esac # Debian maps a machine's own name to 127.0.1.1
    if ip -oneline address show 2>/dev/null | grep -qF " $address/" || hostname -I | grep -qwF "$address"; then conf=is_host=true; fi
done
# An elastic job waits seconds, not half a minute, for machines that join and for machines that do not respond.
if [ "${#elastic[@]}" -gt 0 ]; then conf+=,last_call_timeout=5,keep_alive_interval=2; fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # torchrun would set the same, with a warning
exec "$PYTHON" -m distlenet.launch --nnodes="$nodes" --nproc-per-node="${nproc:-$(default_ranks)}" \
    --rdzv-backend=c10d --rdzv-endpoint="$head:$port" --rdzv-id="$id" --rdzv-conf="$conf" \
    --max-restarts="${restarts:-0}" -m distlenet.train ${elastic[@]+"${elastic[@]}"} "$@"
