"""The command line of every script: help that answers at once and says everything, mistyped words that are understood, the Tab key."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from programs import clean_environment

from common.paths import PROJECT
from config.catalog import setting_of, setting_paths
from config.command_line import Parser
from config.settings import resolve
from tools.list_settings import comments

PROGRAM = re.compile(r'^if __name__ == "__main__":', re.MULTILINE)
# What persons start. The programs of the folders that have no Parser are started by others, with arguments of their own.
SCRIPTS = sorted(
    str(path.relative_to(PROJECT))
    for path in (
        *PROJECT.glob("*.py"),
        *PROJECT.glob("benchmarks/*.py"),
        *PROJECT.glob("cluster/*.py"),
        *PROJECT.glob("tools/*.py"),
    )
    if PROGRAM.search(text := path.read_text()) and (path.parent == PROJECT or "Parser(" in text)
)
# What takes a second or more to import; --help must do without.
HEAVY = ("torch", "torchvision", "deepspeed", "nvidia", "timm", "matplotlib", "onnx")


def without_heavy_imports(script: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run a script where importing any of HEAVY fails."""
    code = (
        f"import runpy, sys\nsys.modules |= dict.fromkeys({HEAVY!r})\nsys.argv = [{script!r}, *{list(arguments)!r}]\n"
        f"sys.path[0] = {str((PROJECT / script).parent)!r}\nrunpy.run_path({str(PROJECT / script)!r}, run_name='__main__')"
    )
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=PROJECT,
        env={**clean_environment(), "COLUMNS": "100"},
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_needs_no_pytorch_and_has_an_example_and_every_default(script):
    done = without_heavy_imports(script, "--help")
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert re.search(r"^example:\n  \S+", done.stdout, re.MULTILINE), done.stdout
    options = done.stdout.split("\nexample:")[0]
    for entry in re.findall(r"^  (--[\w-]+ .*(?:\n {8,}.*)*)", options, re.MULTILINE):
        name, *words = entry.split()
        takes_a_value = re.match(r"[A-Z{]", words[0])
        assert words, f"{name} has no help"
        if takes_a_value and name not in ("--set",):
            assert "default: " in " ".join(words) or "must be given" in " ".join(words), (
                f"{script} {name} does not say its default"
            )


@pytest.mark.parametrize(
    "script", sorted({*SCRIPTS} - {"cluster/run_hosts.py"})
)  # which hands what it does not know to train.py
def test_a_mistyped_option_is_one_sentence(script):
    done = without_heavy_imports(script, "--nonsuch")
    assert (
        done.returncode == 2
        and re.match("error: (unknown option --nonsuch|the following)", done.stderr)
        and done.stderr.count("\n") == 1
    )


PARSER = Parser("python example.py", "Does nothing.", example="python example.py")
for option in ("--epochs", "--set", "--split", "--data-dir"):
    PARSER.add_argument(option)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--epoch 3", "unknown option --epoch; did you mean --epochs?"),
        ("--data_dir x", "unknown option --data_dir; did you mean --data-dir?"),
        ("--lr 1e-3", "unknown option --lr; did you mean --set optimizer.params.lr=1e-3?"),
        ("--learning-rate=1", "unknown option --learning-rate; did you mean --set optimizer.params.lr=1?"),
        ("--batch-size 64", "unknown option --batch-size; did you mean --set train_batch_size=64?"),
        ("--model.width=64", "unknown option --model.width; did you mean --set model.width=64?"),
        ("--mixup --split x", "unknown option --mixup; did you mean --set augmentation.mixup=VALUE?"),
        ("--bf16", "unknown option --bf16; did you mean --set bf16.enabled=VALUE?"),
        ("model.width=64", "unexpected argument 'model.width=64'; did you mean --set model.width=64?"),
        ("stray", "unexpected argument 'stray'"),
        ("--frobnicate", "unknown option --frobnicate"),
    ],
)
def test_what_was_meant_is_suggested(words, said, capsys):
    with pytest.raises(SystemExit) as end:
        PARSER.parse_args(words.split())
    assert end.value.code == 2 and capsys.readouterr().err == f"error: {said} (all options: python example.py --help)\n"


def test_only_the_first_of_several_processes_complains(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit):
        PARSER.parse_args(["--epoch"])
    assert capsys.readouterr().err == ""


def test_settings_are_found_by_their_last_name_and_exist():
    for path in setting_paths():
        assert setting_of(path) == path
        if not path.endswith("_options"):
            assert setting_of(path.rsplit(".")[-1].replace("_", "-")) is not None
    assert setting_of("nonsuch") is None


# --- python train.py --list-settings -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [[], ["--preset", "cpu"], ["--set", "model.feed_forward=fff"], ["--set", "optimizer.type=SGD"]],
    ids=str,
)
def test_the_list_of_settings_is_whole_and_can_be_typed_back(arguments):
    done = without_heavy_imports("train.py", "--list-settings", *arguments)
    listed = dict(re.findall(r"^  ([\w.]+)\s+(\[.*?\]|\S+)", done.stdout, re.MULTILINE))
    shown = {path for path in listed if not path.endswith(".NAME")}
    expected = setting_paths(
        resolve(arguments[1] if "--preset" in arguments else None, arguments[1:] if "--set" in arguments else [])
    )
    assert {path for path in expected if not path.endswith("_options")} == shown, done.stderr
    typed = without_heavy_imports(
        "train.py",
        "--list-settings",
        *(
            word
            for path in sorted(shown, key=lambda path: path.endswith("options.hidden"))
            if listed[path] != "-"
            for word in ("--set", f"{path}={listed[path]}")
        ),
    )
    assert typed.stdout == done.stdout, typed.stderr


def test_comments_of_the_settings_reach_their_paths():
    assert comments()["model.patch"].startswith("side of a square patch") and comments()["image_side"].startswith(
        "pixels the network sees"
    )


# --- the Tab key -------------------------------------------------------------------------------------------------


def complete(line: str) -> set[str]:
    """What bash offers at the end of `line`, after `source environment/completion.sh`."""
    words = " ".join(f"'{word}'" for word in re.split(r"(=)| ", line) if word is not None)
    script = f"""
        source environment/completion.sh && COMP_LINE='{line}' COMP_POINT={len(line)} COMP_TYPE=9 COMP_WORDS=({words}) COMP_CWORD=$(({len(words.split())} - 1))
        function=$(complete -p {line.split()[0]} 2>/dev/null | sed 's/.* -F \\([^ ]*\\) .*/\\1/')
        "${{function:-_python_argcomplete_global}}" {line.split()[0]} 2>/dev/null
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    environment = {**clean_environment(), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", script], cwd=PROJECT, capture_output=True, text=True, timeout=60, env=environment
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("line", "some"),
    [
        ("python train.py --pre", {"--preset"}),
        ("python train.py --preset ", {"cpu", "spt-lsa"}),
        ("python train.py --strategy f", {"fsdp"}),
        ("python train.py --set model.feed_forward=ge", {"geglu"}),
        ("python compare.py experiments/pairs.toml --si", {"--size"}),
        ("./launch_local_train.sh --strategy g", {"gossip"}),
    ],
)
def test_the_tab_key_completes(line, some):
    pytest.importorskip("argcomplete")
    assert some <= complete(line)


def test_the_tab_key_knows_settings():
    pytest.importorskip("argcomplete")
    assert "augmentation.mixup=" in complete("python train.py --set augmentation.mi")
