#!/usr/bin/env bash
# Check that everything works on this machine, and measure how fast it is. For a new GPU machine; a CPU runs the parts that it can.
#   ./gpu_check.sh                      everything: about ten minutes on a large GPU
#   ./gpu_check.sh --quick              under three minutes
#   ./gpu_check.sh --minutes 15         what a GPU can show in 15 minutes, in order of value; installs nothing
#   ./gpu_check.sh --small              a rehearsal of --minutes on a CPU
#   ./gpu_check.sh --list               the parts      ./gpu_check.sh --parts data,train      some of them
#   ./gpu_check.sh --archive cifar100.zip    with the real images; without, data/cifar100 or drawn ones (no network is needed)
# Results are in runs/gpu-check (--out): check.md to read, check.json to keep, a log for each part.
# A Python with PyTorch, NumPy, Pillow, safetensors and tqdm is used as it is (PYTHON, else python3, else .venv), with or
# without DALI and DeepSpeed. Only where there is none, environment/setup.sh installs one, and never with --minutes or --small.
set -euo pipefail
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
needed="torch numpy PIL safetensors tqdm"
[[ ! " $* " =~ " "(-h|--help|--list)" " ]] || needed=numpy    # to print them takes no more
usable() {
    "$1" -c 'import importlib.util as i, sys; sys.exit(sys.version_info < (3, 10) or any(i.find_spec(m) is None for m in sys.argv[1:]))' \
        $needed 2>/dev/null
}
found=""
for python in "${PYTHON:-python3}" "$here/.venv/bin/python"; do
    if usable "$python"; then found=$python; break; fi
done
if [ -z "$found" ]; then
    if [[ $needed == numpy || " $* " == *" --minutes"* || " $* " == *" --small "* ]]; then
        echo "error: ${PYTHON:-python3} lacks PyTorch, NumPy, Pillow, safetensors or tqdm. Set PYTHON=/path/to/python, or run environment/setup.sh first." >&2
        exit 1
    fi
    . "$here/environment/setup.sh"
    found=$PYTHON
fi
exec "$found" "$here/benchmarks/gpu_check.py" "$@"
