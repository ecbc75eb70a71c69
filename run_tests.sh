#!/usr/bin/env bash
# The linter and the tests, from a bare checkout. Arguments go to pytest.
#   ./run_tests.sh            what runs anywhere in some minutes
#   ./run_tests.sh -m slow    the long ones       ./run_tests.sh -m gpu    those that need a GPU
#   ./run_tests.sh -m cluster    several hosts, made of network namespaces of this machine (root, openssh-server, iproute2)
set -euo pipefail
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
. "$here/setup_environment.sh"
cd "$here"

# Operations that DeepSpeed compiles are kept here, out of the reach of other projects' half-finished builds.
export TORCH_EXTENSIONS_DIR=$here/.torch_extensions
export OMP_NUM_THREADS=1      # two processes with a thread per core each were 40 times slower
export HF_HUB_OFFLINE=1       # nothing is fetched while testing
if ! nvidia-smi -L 2>/dev/null | grep -q '^GPU '; then export DS_ACCELERATOR=cpu; fi

selection=(-m "not slow and not gpu and not cluster")
for argument in "$@"; do
    case $argument in -m | -m?*) selection=() ;; esac
done
"$PYTHON" update_readme.py    # the tables of parts follow the code
"$PYTHON" -m ruff check .
exec "$PYTHON" -m pytest -q tests "${selection[@]}" "$@"
