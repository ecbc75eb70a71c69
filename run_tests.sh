#!/usr/bin/env bash
# The linter, the type checker and the tests, from a bare checkout. Arguments go to pytest.
#   ./run_tests.sh            what runs anywhere in some minutes, three files at once (-n 0: one after the other); then, with
#                             a GPU, what needs one
#   ./run_tests.sh -m slow    the long ones       ./run_tests.sh -m gpu    those that need a GPU
# Where several hosts can be made of this machine (root, openssh-server, iproute2), their tests run too; else they say what is
# missing. `-m cluster` are those alone, `-m "not slow and not gpu and not cluster"` all the others.
set -euo pipefail
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
. "$here/environment/setup.sh"
cd "$here"

# Operations that DeepSpeed compiles are kept here, out of the reach of other projects' half-finished builds.
export TORCH_EXTENSIONS_DIR=$here/.torch_extensions

selection=(-m "not slow and not gpu")
# Three files on two cores, because many tests wait for processes. The tests of a file share what they train, so a file stays with one worker; the order is that of tests/conftest.py.
workers=(-n 3 --dist loadfile --no-loadscope-reorder)
for argument in "$@"; do
    case $argument in -m | -m?*) selection=() ;; esac
    case $argument in -m | -m?* | tests/*) workers=() ;; esac
done
"$PYTHON" tools/update_docs.py    # the tables of parts follow the code
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check --quiet .
"$PYTHON" -m mypy
"$PYTHON" -m pytest -q -rs "${selection[@]}" "${workers[@]}" "$@"
if [ $# -eq 0 ] && nvidia-smi -L 2>/dev/null | grep -q '^GPU '; then exec "$PYTHON" -m pytest -q -rs -m "gpu and not slow"; fi
