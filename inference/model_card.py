"""The model card of a run, `runs/<name>/README.md`: network, training, accuracy and use.

It is written from run.json, metrics.jsonl and evaluation_*.json, after training and by each evaluation or export.
Its front matter is YAML for model hubs. Paths of this machine are left out, so that the folder can be published.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from common.display import code_block, code_span, escape_markdown
from common.files import write_atomically
from common.paths import RUNS
from common.text import epochs_text, precision_text
from config.differences import changed_settings
from config.own_parts import published_word, without_folders
from inference.trained_model import WEIGHTS, TrainedModel
from records.provenance import commit_text
from records.run_folder import RunFolder

CHOSEN = {
    WEIGHTS: "the weights after the last epoch, not of the best one",
    "best.safetensors": "the weights of the epoch with the best validation accuracy",
}


def write_card(record: RunFolder) -> Path:
    """Write the card and return its path. Raises RunError where it cannot be written."""
    path = record.folder / "README.md"
    write_atomically(path, card(TrainedModel.open(record.folder), record.metrics()))
    return path


def card(trained: TrainedModel, metrics: list[dict[str, Any]]) -> str:
    """Return the text of the card."""
    results = accuracies(trained, metrics)
    return (
        "\n\n".join(
            [
                head(trained, results),
                f"# {escape_markdown(trained.name)}\n\n{what(trained)}",
                "## Accuracy\n\n" + accuracy_table(results),
                "## Training\n\n" + training(trained, metrics),
                "## Use\n\n" + use(trained),
            ]
        )
        + "\n"
    )


def accuracies(trained: TrainedModel, metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the known accuracies by split and weights.

    An evaluation counts if no epoch was trained after it. Without one of WEIGHTS the metrics of the last epoch count.
    """
    found = []
    for split in ("test", "validation"):
        path = trained.record.folder / f"evaluation_{split}.json"
        report = json.loads(path.read_text()) if path.is_file() else {}
        is_newest = report.get("epochs") == len(metrics)
        if metrics and f"{split}_seen" in metrics[-1] and not (is_newest and report["weights"] == WEIGHTS):
            keys = ("correct", "seen", "accuracy", "top5_accuracy", "loss")
            found.append({"split": split, "weights": WEIGHTS, **{key: metrics[-1][f"{split}_{key}"] for key in keys}})
        found += [report] if is_newest else []
    return found


def head(trained: TrainedModel, results: list[dict[str, Any]]) -> str:
    """Return the front matter, with the accuracy of WEIGHTS. JSON values are valid YAML."""
    dataset = trained.facts["dataset"]["name"]
    measured = [
        {
            "type": "accuracy",
            "name": f"top-1 accuracy on {result['split']} (%)",
            "value": round(100 * result["accuracy"], 2),
        }
        for result in results
        if result["weights"] == WEIGHTS
    ]
    index = [
        {
            "name": trained.name,
            "results": [
                {
                    "task": {"type": "image-classification"},
                    "dataset": {"name": dataset, "type": dataset},
                    "metrics": measured,
                }
            ],
        }
    ]
    lines = {
        "library_name": "pytorch",
        "pipeline_tag": "image-classification",
        "datasets": [dataset],
        **({"model-index": index} if measured else {}),
    }
    return "\n".join(["---", *(f"{key}: {json.dumps(value)}" for key, value in lines.items()), "---"])


def what(trained: TrainedModel) -> str:
    """Return one paragraph about the network."""
    model = without_folders(vars(trained.settings.model))
    parts = ""
    if model["architecture"] == "vit":
        parts = (
            f": {model['patch_embedding']} patches of {model['patch']} pixels, {model['depth']} blocks of width "
            f"{model['width']}, {model['attention']} attention, {model['feed_forward']} feed-forward, "
            f"{model['pooling']} pooling"
        )
    shown = ", ".join(map(escape_markdown, trained.classes[:5])) + (", ..." if len(trained.classes) > 5 else "")
    return (
        f"Network {code_span(model['architecture'])}{parts}; {num_parameters(trained):,} parameters. "
        f"It classifies images of {trained.side} x {trained.side} pixels into the {len(trained.classes)} classes of "
        f"{code_span(trained.facts['dataset']['name'])} ({shown})."
    )


def num_parameters(trained: TrainedModel) -> int:
    """Return the number of trainable parameters; runs that do not record it are counted on the meta device."""
    if recorded := trained.facts.get("num_parameters"):
        return recorded
    import torch

    from model import build_model
    from models.cost import count_parameters

    with torch.device("meta"):
        return count_parameters(build_model(trained.settings.model, len(trained.classes), trained.side))


def accuracy_table(results: list[dict[str, Any]]) -> str:
    """Return the table of accuracies and how the weights were chosen."""
    rows = [
        f"| {result['split']} | {100 * result['accuracy']:.2f}% ({result['correct']}/{result['seen']}) "
        f"| {100 * result['top5_accuracy']:.2f}% | {result['loss']:.4f} | {calibration_error(result)} "
        f"| {code_span(result['weights'])} |"
        for result in results
    ]
    reported = {result["weights"] for result in results}
    notes = [f"`{weights}`: {chosen}." for weights, chosen in CHOSEN.items() if weights in reported]
    notes.append("The test split selected nothing: these programs choose neither an epoch nor a setting on it.")
    head = ["| split | top-1 | top-5 | loss | ECE | weights |", "|---|---|---|---|---|---|"]
    return "\n".join(
        [*head, *rows, "", *notes, "ECE: expected calibration error, 15 bins (`evaluate.py` measures it)."]
    )


def calibration_error(result: dict[str, Any]) -> str:
    """Return the expected calibration error in percent, or a dash where it was not measured."""
    error = result.get("expected_calibration_error")
    return "-" if error is None else f"{100 * error:.2f}%"


def training(trained: TrainedModel, metrics: list[dict[str, Any]]) -> str:
    """Return the provenance of the weights and the command that trains them again."""
    facts = trained.facts
    dataset, engine = facts["dataset"], facts["settings"]["engine"]
    images = ", ".join(f"{count:,} {name}" for name, count in dataset["num_images"].items())
    seconds = sum(line["training_seconds"] for line in metrics)
    trained_steps = metrics[-1]["step"] if metrics else 0
    epochs = epochs_text(trained_steps, facts["steps_per_epoch"])
    steps = f"{trained_steps:,} of {facts['total_steps']:,} steps"
    lines = {
        "command": code_span(shlex.join(["python", *map(published_word, facts["command"])])),
        "commit": commit_text(facts, 12),
        "data": f"{escape_markdown(dataset['name'])}: {images} images; {dataset['fingerprint']}",
        "length": f"{steps} of {engine['train_batch_size']} images ({epochs}), seed {facts['seed']}, "
        f"{seconds:,.0f} s of training",
        "machine": f"{facts['num_processes']} x {facts['device']}, {facts['settings']['strategy']}, "
        f"{precision_text(facts['precision'])}",
        "started from": escape_markdown(str(facts["init_weights"] or "random weights")),
        "versions": ", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
    }
    changed = "\n".join(
        f"{path.removeprefix('engine.')}={value!r}"
        for path, value, _ in changed_settings(without_folders(facts["settings"]))
        if value is not None
    )
    table = "\n".join([f"| {name} | {value} |" for name, value in lines.items()])
    heading = "Settings that differ from the defaults (`run.json` has all of them):"
    return f"| | |\n|---|---|\n{table}\n\n{heading}\n\n{code_block(changed)}"


def use(trained: TrainedModel) -> str:
    """Return commands and short Python programs that use the run; tests/inference/test_onnx_export.py runs them."""
    folder = f"runs/{name_below_runs(trained)}"
    word, python = shlex.quote(folder), json.dumps(folder)
    model = json.dumps(f"{folder}/model.onnx")
    return f"""`{WEIGHTS}` holds plain fp32 tensors. Run this in the folder of the project, in its environment:

```bash
python evaluate.py {word} --predict image.png
python evaluate.py {word} --export onnx
```

```python
from inference.predict_images import fit, read_image
from inference.trained_model import TrainedModel

trained = TrainedModel.open({python})
pixels = fit(read_image("image.png"), trained)[None]
print(trained.classes[trained.network()(trained.normalize(pixels)).argmax()])
```

The exported file does not need this project:

```python
import json, numpy, onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession({model})
image = ImageOps.exif_transpose(Image.open("image.png")).convert("RGB")
size = [{trained.resize_side} * side // min(image.size) for side in image.size]
left, top = [round((side - {trained.side}) / 2) for side in size]
image = image.resize(size, Image.BILINEAR).crop((left, top, left + {trained.side}, top + {trained.side}))
scores = session.run(None, {{"images": numpy.array(image)[None]}})[0]
print(json.loads(session.get_modelmeta().custom_metadata_map["classes"])[scores.argmax()])
```

Preprocessing: {trained.preprocessing_text}; scaled to 0..1, minus the mean {numbers(trained, "mean")}, divided by the
standard deviation {numbers(trained, "std")}. The exported graph takes the pixels themselves, uint8 (B, {trained.side},
{trained.side}, 3)."""


def name_below_runs(trained: TrainedModel) -> str:
    """Return the path of the run below the folder of runs: <name>, or <comparison>/<name>."""
    folder, runs = trained.record.folder.resolve(), RUNS.resolve()
    return folder.relative_to(runs).as_posix() if folder.is_relative_to(runs) else folder.name


def numbers(trained: TrainedModel, name: str) -> str:
    """Return the mean or the std of the channels as text."""
    return ", ".join(f"{value:.4f}" for value in trained.facts["dataset"][name])
