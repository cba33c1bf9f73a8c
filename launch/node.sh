#!/usr/bin/env bash
set -euo pipefail

usage() {
    cat <<'TEXT'
launch/node.sh --nodes N|MIN:MAX --head HOST [options] [--config FILE]... [key=value]...
    Train on several machines: type the same line on each of them. The run folder (run.dir) is on a disk of all.
    --nodes N         how many machines; MIN:MAX for an elastic job, which goes on with those that are there
    --head HOST       name or address of one of them, where they meet; an elastic job ends with it
    --port PORT       where they meet there (29400); another one for each job that runs at the same time
    --id NAME         the same on all machines, another one for each job (distlenet)
    --interface NAME  network interface between the machines, such as eth0, where they have several
    -n NPROC          ranks on this machine (one for every GPU, or else 2)
    -r RESTARTS       how often ranks that die, or machines that leave, lead to a restart (0; 100 with MIN:MAX)
    -h, --help        this text
    Environment: PYTHON, the interpreter (.venv/bin/python, else python3)
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
        --port) port=$(whole_number "$@"); shift 2 ;;
        --id) id=$(argument "$@"); shift 2 ;;
        --interface) interface=$(argument "$@"); shift 2 ;;
        -n) nproc=$(whole_number "$@"); shift 2 ;;
        -r) restarts=$(whole_number "$@"); shift 2 ;;
        --config) break ;;
        -*) refuse "unknown option $1" ;;
        *) break ;;
    esac
done
[ -n "$nodes" ] || refuse "--nodes is missing: how many machines train, such as --nodes 2"
[ -n "$head" ] || refuse "--head is missing: the name of the machine where all meet, such as --head $(hostname)"
[[ $nodes =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]] || refuse "--nodes $nodes: expected N or MIN:MAX, such as 2 or 1:4"
if [[ $nodes == *:* ]]; then
    [ "${nodes%:*}" -le "${nodes#*:}" ] || refuse "--nodes $nodes: MIN is above MAX"
    restarts=${restarts:-100} elastic=(distributed.allow_uneven_batches=true)
    # A store that outlives a round is not announced to machines that join in a later one (seen with torch 2.15).
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
fi
if [ -n "$interface" ]; then
    [ -e "/sys/class/net/$interface" ] ||
        refuse "--interface $interface: this machine has $(cd /sys/class/net && echo * | sed 's/ /, /g')"
    export GLOO_SOCKET_IFNAME=$interface NCCL_SOCKET_IFNAME=$interface
fi
addresses=$(getent ahosts "$head" | cut -d' ' -f1 | sort -u) || refuse "--head $head: no such host"

# torchrun recognises the head by its name, not by an address; so it is told.
conf=is_host=false
for address in $addresses; do
    case $address in 127.* | ::1) conf=is_host=true ;; esac # Debian's own name is 127.0.1.1 to itself
    if ip -oneline address show 2>/dev/null | grep -qF " $address/" || hostname -I | grep -qwF "$address"; then conf=is_host=true; fi
done
# An elastic job waits for more machines, and for a silent one, for seconds, not for half a minute.
if [ "${#elastic[@]}" -gt 0 ]; then conf+=,last_call_timeout=5,keep_alive_interval=2; fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # as distlenet and torchrun do where nothing is said; torchrun with a warning
exec "$PYTHON" -m torch.distributed.run --nnodes="$nodes" --nproc-per-node="${nproc:-$(ranks_here)}" \
    --rdzv-backend=c10d --rdzv-endpoint="$head:$port" --rdzv-id="$id" --rdzv-conf="$conf" \
    --max-restarts="${restarts:-0}" -m distlenet.train ${elastic[@]+"${elastic[@]}"} "$@"
