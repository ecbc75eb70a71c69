"""Save a run as one small JSON file under results/runs/, to be committed.

    python tools/keep_run.py runs/mine [--note "on two busy cores"]

The file holds run.json and metrics.jsonl. Absolute paths are cut to their last part, and class names are left out.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.files import write_atomically
from common.paths import RESULTS, RUNS
from config.command_line import Parser, run_cli
from config.own_parts import published_word, without_folders
from records.named_run import find_run
from records.run_folder import RunFolder


def kept(record: RunFolder, note: str | None = None) -> dict[str, Any]:
    """Return the content of the file. Raises RunError for a folder without a run or without a finished epoch."""
    facts, metrics = record.facts(), record.metrics()
    if not metrics:
        raise record.no_epoch()
    facts["command"] = [published_word(word) for word in facts["command"]]
    facts["dataset"] = {key: value for key, value in facts["dataset"].items() if key not in ("classes", "folder")}
    facts = without_folders(facts)
    facts.pop("own_parts", None)
    if code := facts.get("code"):
        code["files"] = {path if path[:2] != ".." else Path(path).name: text for path, text in code["files"].items()}
    evaluation = record.folder / "evaluation_test.json"
    if evaluation.is_file():
        report = json.loads(evaluation.read_text())
        facts["evaluated"] = {
            key: report[key] for key in ("correct", "correct_top5", "seen", "accuracy", "top5_accuracy", "loss")
        }
    return {"run": record.folder.name, **({"note": note} if note else {}), **facts, "metrics": metrics}


def main() -> None:
    parser = Parser(
        "python tools/keep_run.py run",
        "Save a run as one small JSON file under results/runs/.",
        example='python tools/keep_run.py runs/mine --note "on two busy cores"',
    )
    parser.add_argument("run", type=Path, help="run folder or name of a run")
    parser.add_argument("--note", metavar="TEXT", help="remark for readers of the numbers (default: none)")
    args = parser.parse_args()
    folder = find_run(args.run, RUNS)
    content = kept(RunFolder(folder), args.note)
    (RESULTS / "runs").mkdir(parents=True, exist_ok=True)
    path = RESULTS / "runs" / f"{folder.resolve().name}.json"
    write_atomically(path, json.dumps(content, indent=1) + "\n")
    print(f"wrote results/runs/{path.name}")


if __name__ == "__main__":
    sys.exit(run_cli(main))
