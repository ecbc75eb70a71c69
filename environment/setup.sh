#!/usr/bin/env bash
# Find a Python with the packages of requirements.txt, or install one in .venv. Run it alone, or source it as the other
# scripts do: PYTHON is then the interpreter, and PATH begins with its folder of programs (DeepSpeed looks for `ninja` there).
#   PYTHON=/path/to/python  interpreter to check (default: python3)
#   DRIVER_CUDA=12          choose the packages for a driver of this CUDA version ("none": no GPU)
#   FIRST_PYTHON=python3.12 interpreter to make .venv with where it is installed (--sync names its own version)
#   INSTALLER=pip           install with pip alone, not with uv, which takes half a minute where pip takes three
#   DRY_RUN=1               print the choice, but install nothing

environment_root=$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")

# In a subshell, and never an error: a terminal that is closed, or a pipe without a reader, must not end the script.
say() { (printf '%s\n' "$*" >&2) || true; }

# Print a free port, under 32768, so that no outgoing connection takes it before the ranks meet there.
free_port() {
    local port
    while port=$((20000 + RANDOM % 12000)); do
        (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null || { echo "$port"; return; }
    done
}

# has_requirements PYTHON FILE: print the interpreter's folder of programs if it has all of FILE; otherwise print what is
# missing and fail. It reads only the packages' metadata: importing torch would take seconds at every start.
has_requirements() {
    "$1" - "$2" 2>/dev/null <<'PYTHON'
import os, re, sys, sysconfig
from importlib.metadata import PackageNotFoundError, version

def find(name):
    # An environment made by hand may have DALI for another CUDA version, which works too.
    for name in [name] + [f"nvidia-dali-cuda{c}" for c in ("130", "120", "110") if "-dali-" in name]:
        try:
            return version(name).split("+")[0]
        except PackageNotFoundError:
            pass

missing, other = [], []
if not sys.version_info >= (3, 10):
    missing.append("Python 3.10 or newer")
for line in open(sys.argv[1]):
    if pin := re.match(r'([\w-]+)==([\w.]+)(?:; python_version (<|>=) "3\.(\d+)")?', line):
        name, wanted, order, minor = pin.groups()
        if order and (sys.version_info[:2] < (3, int(minor))) != (order == "<"):
            continue
        found = find(name)
        if found is None or name == "torch" and found.startswith("1."):
            missing.append(name)
        elif found != wanted:
            other.append(f"{name} {found} (tested: {wanted})")
print("missing " + ", ".join(missing) if missing else sysconfig.get_path("scripts"))
print(", ".join(other))
sys.exit(bool(missing))
PYTHON
}

# Set `requirements` to the file for this machine's driver, and `reason`.
choose_requirements() {
    local cuda=${DRIVER_CUDA:-} report=""
    reason="DRIVER_CUDA=$cuda"
    if [ -z "$cuda" ]; then
        report=$(nvidia-smi 2>/dev/null) || report=""
        if [[ $report =~ CUDA\ (UMD\ )?Version:\ *([0-9]+) ]]; then
            cuda=${BASH_REMATCH[2]} reason="the NVIDIA driver is for CUDA $cuda"
        elif [[ $report =~ (Driver|KMD)\ Version:\ *([0-9]+) ]]; then    # in containers the CUDA version can read N/A
            reason="the NVIDIA driver is version ${BASH_REMATCH[2]}"
            cuda=$((BASH_REMATCH[2] >= 580 ? 13 : BASH_REMATCH[2] >= 525 ? 12 : BASH_REMATCH[2] >= 450 ? 11 : 10))
        else
            # A login node has no driver, but may share its .venv with nodes that have one: the set of .venv stays.
            reason="no NVIDIA driver found"
            case $(cat "$environment_root/.venv/requirements.sha256" 2>/dev/null) in
                *-cuda11.txt) cuda=11 ;; *-cuda12.txt) cuda=12 ;; *) cuda=none ;;
            esac
        fi
    fi
    case ${cuda%%.*} in
        11) requirements=environment/requirements-cuda11.txt newest_python=11 ;;
        12) requirements=environment/requirements-cuda12.txt newest_python=14 ;;
        none | 1[3-9] | [2-9][0-9]) requirements=requirements.txt newest_python=14 ;;
        [1-9] | 10) say "error: this machine's driver is too old ($reason): CUDA 11 is the oldest that works; update the NVIDIA driver," \
            "or train on the CPU: DRIVER_CUDA=none DS_ACCELERATOR=cpu."; return 1 ;;
        *) say "error: DRIVER_CUDA must be a CUDA version, such as 12, or none, not '$cuda'."; return 1 ;;
    esac
}

# Set `base` to an interpreter that the chosen packages support.
choose_base_python() {
    local candidate version candidates=(${FIRST_PYTHON:-} python3 python3.13 python3.12 python3.11 python3.10 python3.14)
    [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        version=$("$candidate" -c 'import sys; print(*sys.version_info[:2])' 2>/dev/null) || continue
        if [[ $version == "3 "* ]] && ((${version#3 } >= 10 && ${version#3 } <= newest_python)); then base=$candidate; return; fi
    done
    say "error: $requirements needs Python 3.10 to 3.$newest_python, and ${PYTHON:-python3} is $("${PYTHON:-python3}" --version 2>&1 || true):" \
        "install one (apt-get install python3 python3-venv) or name it with PYTHON=/path/to/python."
    return 1
}

venv_is_ready() {
    [ -x .venv/bin/python ] && [ "$(cat .venv/requirements.sha256 2>/dev/null)" = "$(sha256sum "$requirements")" ] &&
        has_requirements .venv/bin/python "$requirements" >/dev/null
}

has_uv() { [ "${INSTALLER:-uv}" = uv ] && command -v uv >/dev/null; }

# make_venv [--clear]: make .venv with pip in it, by uv where there is one, which needs no python3-venv.
make_venv() {
    if has_uv && uv venv --quiet --seed --python "$base" "${1:---allow-existing}" .venv >&2; then return; fi
    if ! "$base" -c 'import venv, ensurepip' 2>/dev/null; then
        say "error: $base cannot make a virtual environment: apt-get install python3-venv (or python3.N-venv for its version), then start again."
        return 1
    fi
    "$base" -m venv "$@" .venv
}

# fetch_uv: without a uv on PATH, let pip install it into .venv (20 MB).
fetch_uv() {
    [ "${INSTALLER:-uv}" = uv ] && PIP_USER=0 .venv/bin/python -m pip install --quiet --disable-pip-version-check --retries 1 'uv>=0.5' \
        >/dev/null 2>&1 && [ -x .venv/bin/uv ]
}

# install_with_uv UV: install $requirements into .venv. uv downloads and unpacks in parallel and keeps a cache; the exact
# pins make its choices those of pip, and it gets pip's indexes.
install_with_uv() (
    while IFS= read -r setting; do export "${setting?}"; done \
        < <(.venv/bin/python -m pip config list 2>/dev/null | .venv/bin/python environment/pip_settings_for_uv.py)
    # unsafe-best-match: choose versions over all indexes as pip does, instead of from the first that has the package
    # --compile-bytecode: as pip does. Where PYTHONDONTWRITEBYTECODE is set, every start would compile all that it imports.
    exec "$1" pip install --compile-bytecode --index-strategy unsafe-best-match --python .venv/bin/python -r "$requirements" >&2
)

# Install $requirements into .venv, with uv if possible. Where uv fails (a mirror that it does not understand, a version
# that lacks an option), pip does the work.
install_packages() {
    local uv=""
    if has_uv; then uv=uv; elif fetch_uv; then uv=.venv/bin/uv; fi
    if [ -n "$uv" ]; then
        if install_with_uv "$uv"; then return; fi
        say "uv could not install $requirements (the reason is above): installing with pip."
    fi
    # --use-pep517: without it older pips build DeepSpeed inside the environment, which fails where nvcc is missing.
    local command=(.venv/bin/python -m pip install --disable-pip-version-check --use-pep517 -r "$requirements")
    if [ -z "$is_new" ]; then    # an environment is completed: without a line for each package that it has already
        # pip draws progress bars on a terminal only; a first install, which takes minutes, keeps them (below).
        PIP_USER=0 "${command[@]}" 2>&1 | { grep --line-buffered -v '^Requirement already satisfied' || true; } >&2
        return "${PIPESTATUS[0]}"
    fi
    PIP_USER=0 "${command[@]}" >&2
}

install_venv() {
    local base installed is_new=""
    choose_base_python || return
    if ! command -v "${CXX:-g++}" >/dev/null && ! command -v c++ >/dev/null; then
        say "error: no C++ compiler found (DeepSpeed and torch build operations with it): apt-get install g++, then start again."
        return 1
    fi
    # Start from an empty .venv after an interrupted install, or for another CUDA version (two DALIs share one folder).
    # A .venv that this script did not create is kept and completed.
    installed=$(cat .venv/requirements.sha256 2>/dev/null) || true
    if [ -e .venv/installing ] || [[ -n $installed && $installed != *" $requirements" ]]; then
        is_new=1
        make_venv --clear || return
    elif [ ! -x .venv/bin/python ]; then
        is_new=1
        make_venv || return
    fi
    if [ -n "$is_new" ]; then
        say "Installing $requirements ($reason) into $environment_root/.venv: some gigabytes, some minutes, once."
    else
        say "Completing $environment_root/.venv: $requirements has changed, or a package is missing."
    fi
    touch .venv/installing
    if ! install_packages; then
        say "error: installing $requirements failed (the reason is above). Start again to retry; without a network, set PYTHON to an interpreter that has the packages."
        return 1
    fi
    sha256sum "$requirements" >.venv/requirements.sha256
    rm .venv/installing
}

setup_environment() {
    local requirements reason newest_python scripts found active=${PYTHON:-python3}
    if [[ ! ${DS_ACCELERATOR:-} =~ ^(cpu|cuda)?$ ]]; then    # DeepSpeed's launcher would end with a traceback
        say "error: DS_ACCELERATOR=$DS_ACCELERATOR is unknown; write DS_ACCELERATOR=cpu, or unset it."
        return 1
    fi
    case $active in */*) active=$(realpath -s -- "$active") PYTHON=$active ;; esac    # the folder changes below
    # PYTHON may name the project's own .venv before it exists: any other interpreter can create it.
    if [[ $active == "$environment_root/.venv/"* && ! -x $active ]]; then PYTHON=""; fi
    choose_requirements || return
    if found=$(has_requirements "$active" "$environment_root/$requirements"); then
        PYTHON=$(command -v "$active")
        scripts=${found%%$'\n'*}
        [ "$found" = "$scripts" ] || say "Note: $PYTHON has ${found#*$'\n'}."
    else
        found=${found:-missing Python 3.10 or newer}    # it could not run the check
        if ! (cd "$environment_root" && venv_is_ready); then
            say "$active lacks what is needed (${found%%$'\n'*}), so .venv is used, with $requirements ($reason)."
            if [ -z "${DRY_RUN:-}" ]; then
                # The lock is on this file, so no lock file remains; the second of two starts finds the work done.
                (
                    cd "$environment_root" || exit
                    flock -n 9 || { say "Another start is installing into .venv: waiting for it."; flock 9; }
                    venv_is_ready || install_venv
                ) 9<"$environment_root/environment/setup.sh" || return
            fi
        fi
        PYTHON=$environment_root/.venv/bin/python scripts=$environment_root/.venv/bin
    fi
    PATH=$scripts:$PATH
}

setup_environment || return 1 2>/dev/null || exit 1
