# shellcheck shell=bash
# Shared by the launch scripts.

PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}

usage_error() {
    echo "$(basename "$0"): $*; --help lists all options" >&2
    exit 2
}

# argument OPTION VALUE ...: print the value; exit if it is missing.
argument() {
    [ $# -ge 2 ] || usage_error "$1: a value is missing"
    echo "$2"
}

integer() {
    local value
    value=$(argument "$@") || exit 2
    [[ $value =~ ^[0-9]+$ ]] || usage_error "$1 $value: expected an integer"
    echo "$value"
}

# Print the default number of ranks: one per GPU, or 2 on the CPU.
default_ranks() { "$PYTHON" -c 'import torch; print(torch.cuda.device_count() or 2)'; }
