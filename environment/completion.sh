# Tab completion of options, presets, strategies and settings, in bash and zsh. For the current shell:
#   source .venv/bin/activate && source environment/completion.sh
# It works for `python train.py ...`, the other scripts and the two launchers, from any folder.
if ! command -v register-python-argcomplete >/dev/null; then
    echo "environment/completion.sh: the environment is not active; first: source .venv/bin/activate" >&2
    return 1
fi
completion_root=$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]:-${(%):-%x}}")")")
if [ -n "${ZSH_VERSION:-}" ]; then autoload -Uz compinit && compinit; fi
eval "$(activate-global-python-argcomplete --dest=-)"
eval "$(register-python-argcomplete --external-argcomplete-script "$completion_root/train.py" \
    ./launch_local_train.sh launch_local_train.sh ./launch_distributed_train.sh launch_distributed_train.sh)"
unset completion_root
