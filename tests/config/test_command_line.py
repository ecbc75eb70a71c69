"""The command line of every script: fast and complete help, suggestions for mistyped words, Tab completion."""

from __future__ import annotations

import argparse
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from programs import clean_environment
from project_files import project_files

from common.errors import RunError
from common.paths import PROJECT
from config import command_line
from config.catalog import setting_of, setting_paths
from config.command_line import Parser, run_cli, run_name
from config.settings import declared_settings, resolve
from tools.list_settings import markdown
from training.arguments import parse_arguments

PROGRAM = re.compile(r'^if __name__ == "__main__":', re.MULTILINE)
# Scripts that users start. Programs without a Parser are started by other programs, with arguments of their own.
ROOT = [name for name in project_files(".py") if "/" not in name]
SCRIPTS = [
    name
    for name in project_files(".py")
    if name in ROOT or os.path.dirname(name) in ("benchmarks", "cluster", "tools")
    if PROGRAM.search(text := (PROJECT / name).read_text()) and (name in ROOT or "Parser(" in text)
]
# Libraries that take a second or more to import; --help must not need them.
HEAVY = ("torch", "torchvision", "deepspeed", "nvidia", "timm", "matplotlib", "onnx")


def without_heavy_imports(script: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run a script with imports of HEAVY failing."""
    code = (
        f"import runpy, sys\nsys.modules |= dict.fromkeys({HEAVY!r})\nsys.argv = [{script!r}, *{list(arguments)!r}]\n"
        f"sys.path[0] = {str((PROJECT / script).parent)!r}\nrunpy.run_path({str(PROJECT / script)!r}, "
        "run_name='__main__')"
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
    for entry in re.findall(r"^  (--.*(?:\n {8,}.*)*)", options, re.MULTILINE):
        option, *text = re.split(r" {2,}|\n +", entry, maxsplit=1)
        assert text, f"{script} {option} has no help"
        name, *value = option.rpartition(", ")[2].split(maxsplit=1)  # the last of several names
        if value and name != "--set":
            assert re.search(r"default:\s|must\s+be\s+given", text[0]), f"{script} {name} does not say its default"


@pytest.mark.parametrize(
    "script", sorted({*SCRIPTS} - {"cluster/run_hosts.py"})
)  # it passes unknown options on to train.py
def test_a_mistyped_option_is_one_sentence(script):
    done = without_heavy_imports(script, "--nonsuch")
    assert (
        done.returncode == 2
        and re.match("error: (unknown option --nonsuch|the following)", done.stderr)
        and done.stderr.count("\n") == 1
    )


@pytest.mark.parametrize("script", sorted({*ROOT} - {"report.py"}))
def test_a_python_without_the_packages_is_one_sentence(script):
    done = subprocess.run([sys.executable, "-S", PROJECT / script], cwd="/", capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert re.match(r"error: \S+ lacks the package \w+. Run source .venv/bin/activate first", done.stderr)


def test_other_errors_keep_their_traceback(tmp_path):
    (tmp_path / "mine.py").write_text("import common.errors\nimport common.nonsuch\n")
    environment = {**clean_environment(), "PYTHONPATH": str(PROJECT)}
    done = subprocess.run([sys.executable, tmp_path / "mine.py"], env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" in done.stderr and "No module named 'common.nonsuch'" in done.stderr


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
        ("--wd 0.1", "unknown option --wd; did you mean --set optimizer.params.weight_decay=0.1?"),
        ("--optimizer adamw", "unknown option --optimizer; did you mean --set optimizer.type=AdamW?"),
        ("--model vit", "unknown option --model; did you mean --set model.architecture=vit?"),
        (
            "--warmup-epochs 5",
            "unknown option --warmup-epochs; did you mean --set schedule.warmup_fraction=FRACTION "
            "(a fraction of the run's steps, such as 0.05)?",
        ),
        (
            "--min-lr 1e-5",
            "unknown option --min-lr; did you mean --set schedule.final_factor=FACTOR "
            "(a factor of the peak learning rate, such as 0.01)?",
        ),
        (
            "--device cpu",
            "unknown option --device: training uses the GPU, or the CPU without one; DS_ACCELERATOR=cpu "
            "chooses the CPU",
        ),
        ("--root photos", "unknown option --root: train.py takes an image tree as --data-dir DIR"),
        (
            "--resume runs/first",
            "unknown option --resume: starting the same command again resumes the run; --fresh starts over",
        ),
    ],
)
def test_the_meant_option_or_setting_is_suggested(words, said, capsys):
    with pytest.raises(SystemExit) as end:
        PARSER.parse_args(words.split())
    assert end.value.code == 2 and capsys.readouterr().err == f"error: {said} (all options: python example.py --help)\n"


@pytest.mark.parametrize("is_ended", [True, False], ids=["a launcher ends it", "RANK is left over"])
def test_only_the_first_of_several_processes_complains(is_ended, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(command_line, "stop_requested", lambda: is_ended)
    monkeypatch.setattr(command_line, "SHARED_ERROR_SECONDS", 0.0)
    with pytest.raises(SystemExit):
        PARSER.parse_args(["--epoch"])
    assert capsys.readouterr().err.count("unknown option --epoch") == (not is_ended)


def test_settings_are_found_by_their_last_name_and_exist():
    for path in setting_paths():
        assert setting_of(path) == path
        if not path.endswith(("_options", ".device", ".type", ".enabled")):  # too general to mean these
            assert setting_of(path.rsplit(".")[-1].replace("_", "-")) is not None
    assert setting_of("nonsuch") is None


# --- python train.py --list-settings -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [[], ["--preset", "cpu"], ["--set", "model.feed_forward=fff"], ["--set", "optimizer.type=SGD"]],
    ids=str,
)
def test_the_list_of_settings_is_complete_and_can_be_typed_back(arguments):
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


def test_every_setting_has_a_description_that_stands_alone_and_a_valid_default():
    declared = declared_settings()
    assert set(setting_paths()) == set(declared)
    for path, what in declared.items():
        assert what.description.split()[0].rstrip(",:;").lower() not in (
            "of",
            "the",
            "whether",
            "how",
            "what",
            "where",
        ), path
        assert len(what.description) > 8 or path == "optimizer.type", path


def test_the_markdown_tables_have_every_setting_once():
    rows = re.findall(r"^\| `([\w.]+?)(?:\.NAME)?` \|", markdown(None, []), re.MULTILINE)
    assert sorted(rows) == sorted(declared_settings())


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ("first", True),
        ("a b.c-1", True),
        ("größe", True),
        ("", False),
        (".", False),
        ("..", False),
        ("a/b", False),
        ("../x", False),
        ("a\\b", False),
        ("-x", False),  # commands would read it as an option
        (" ", False),
        ("a ", False),
        ("a\nb", False),
        ("a\x07", False),
        ("a\u202eb", False),  # right-to-left override
        ("x" * 201, False),
    ],
)
def test_a_run_name_is_one_path_component(text, valid):
    if valid:
        assert run_name(text) == text
    else:
        with pytest.raises(argparse.ArgumentTypeError, match="must"):
            run_name(text)


def test_a_tilde_is_the_home_folder_in_every_path_option(monkeypatch, tmp_path):
    parser = Parser("python example.py", "Does nothing.", example="python example.py")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--more", type=Path, nargs="*")
    monkeypatch.setenv("HOME", str(tmp_path))
    found = parser.parse_args(["--folder=~/x", "--more", "~/y", "z"])
    assert found.folder == tmp_path / "x" and found.more == [tmp_path / "y", Path("z")]
    with pytest.raises(SystemExit):
        parser.parse_args(["--folder=~no-such-user-here/x"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--seed", "9" * 20], "argument --seed: must be a whole number from 0 to 9223372036854775807, not "),
        (["--seed", "-1"], "argument --seed: must be a whole number from 0 to"),
        (["--seed", "1e3"], "argument --seed: must be a whole number from 0 to"),
        (["--hold-out", "10"], "argument --hold-out: must be a number between 0 and 1, for example 0.1, not 10"),
        (["--hold-out", "nan"], "argument --hold-out: must be a number between 0 and 1"),
        (["--epochs", "1.5"], "argument --epochs: must be a whole number of at least 1, not 1.5"),
        (["--epochs", "0"], "argument --epochs: must be at least 1, not 0"),
        (["--name", ".."], "argument --name: must be a single folder name, not '..'"),
        (["--keep-checkpoints", "-3"], "argument --keep-checkpoints: must be at least 1, not -3"),
    ],
)
def test_a_value_out_of_range_is_one_sentence(words, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    with pytest.raises(SystemExit) as end:
        parse_arguments()
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.startswith(f"error: {said}") and err.count("\n") == 1


def test_a_reader_that_goes_away_is_no_error():
    command = f"set -o pipefail; {shlex.quote(sys.executable)} train.py --list-settings | head -1"
    done = subprocess.run(["bash", "-c", command], cwd=PROJECT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == ""


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [(RunError("no such run"), 1, "error: no such run\n"), (KeyboardInterrupt(), 130, "error: interrupted\n")],
)
def test_what_ends_a_script_is_one_line(error, code, said, capsys):
    def main() -> int:
        raise error

    assert run_cli(main) == code and capsys.readouterr().err == said


def test_a_script_survives_a_closed_output(monkeypatch):
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stdout", closed)  # as after `evaluate.py >&-`
    monkeypatch.setattr(sys, "stderr", None)
    assert run_cli(lambda: print("the result", flush=True) or print("a warning", file=sys.stderr) or 3) == 3


# --- Tab completion -------------------------------------------------------------------------------------------------


def complete(line: str) -> set[str]:
    """What bash offers at the end of `line`, after `source environment/completion.sh`."""
    words = " ".join(f"'{word}'" for word in re.split(r"(=)| ", line) if word is not None)
    script = f"""
        source environment/completion.sh && COMP_LINE='{line}' COMP_POINT={len(line)} COMP_TYPE=9 \\
            COMP_WORDS=({words}) COMP_CWORD=$(({len(words.split())} - 1))
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
def test_tab_completes_options_and_names(line, some):
    pytest.importorskip("argcomplete")
    assert some <= complete(line)


def test_tab_completes_settings():
    pytest.importorskip("argcomplete")
    assert "augmentation.mixup=" in complete("python train.py --set augmentation.mi")
