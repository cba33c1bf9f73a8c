# shellcheck shell=bash
# What the launch scripts share.

PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}

refuse() {
    echo "$(basename "$0"): $*; --help lists all options" >&2
    exit 2
}

# argument OPTION VALUE ...: the value, or a refusal where there is none.
argument() {
    [ $# -ge 2 ] || refuse "$1: a value is missing"
    echo "$2"
}

whole_number() {
    local value
    value=$(argument "$@") || exit 2
    [[ $value =~ ^[0-9]+$ ]] || refuse "$1 $value: expected a whole number"
    echo "$value"
}

# Ranks for this machine: one for every GPU, or else 2 on the CPU.
ranks_here() { "$PYTHON" -c 'import torch; print(torch.cuda.device_count() or 2)'; }
