#!/usr/bin/env bash
# Does everything work on this machine, and how fast is it? One command for a new GPU box (a CPU gets the parts that it can do).
#   ./gpu_check.sh                      everything: about ten minutes on a large GPU
#   ./gpu_check.sh --quick              under three minutes
#   ./gpu_check.sh --list               the parts      ./gpu_check.sh --parts data,train      some of them
#   ./gpu_check.sh --archive cifar100.zip    with the real images; without, with drawn ones (no network is needed)
# What it finds is written to runs/gpu-check (--out): check.md to read, check.json to keep, a log for each part.
set -euo pipefail
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
. "$here/environment/setup.sh"
exec "$PYTHON" "$here/benchmarks/gpu_check.py" "$@"
