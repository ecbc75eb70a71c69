"""The model card of a run, `runs/<name>/README.md`: what the network is, how it was trained, how good it is, how to use it.

Written from run.json, metrics.jsonl and evaluation_*.json alone, by training at its end and by every evaluation and export.
Its head is what model hubs read (YAML); paths of this machine are left out, so the folder can be handed on.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from common.files import write_atomically
from config.differences import changed_settings
from inference.trained_model import WEIGHTS, TrainedModel
from records.run_folder import RunFolder


def write_card(record: RunFolder) -> Path:
    """Write the card, and return its path."""
    path = record.folder / "README.md"
    write_atomically(path, card(TrainedModel.open(record.folder), record.metrics()))
    return path


def card(trained: TrainedModel, metrics: list[dict[str, Any]]) -> str:
    """The text of the card."""
    results = accuracies(trained, metrics)
    return (
        "\n\n".join(
            [
                head(trained, results),
                f"# {trained.name}\n\n{what(trained)}",
                "## Accuracy\n\n" + accuracy_table(results, metrics),
                "## Training\n\n" + training(trained, metrics),
                "## Use\n\n" + use(trained),
            ]
        )
        + "\n"
    )


def accuracies(trained: TrainedModel, metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is known of the accuracy: evaluations of the newest weights, and else what training said after its last epoch."""
    found = []
    for split in ("test", "validation"):
        path = trained.record.folder / f"evaluation_{split}.json"
        report = json.loads(path.read_text()) if path.is_file() else {}
        if report.get("epochs") == len(metrics):
            found.append(report)
        elif metrics and f"{split}_seen" in metrics[-1]:
            keys = ("correct", "seen", "accuracy", "top5_accuracy", "loss")
            found.append({"split": split, "weights": WEIGHTS, **{key: metrics[-1][f"{split}_{key}"] for key in keys}})
    return found


def head(trained: TrainedModel, results: list[dict[str, Any]]) -> str:
    """What programs read: JSON is YAML."""
    dataset = trained.facts["dataset"]["name"]
    measured = [
        {
            "type": "accuracy",
            "name": f"top-1 accuracy on {result['split']} (%)",
            "value": round(100 * result["accuracy"], 2),
        }
        for result in results
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
    """One paragraph."""
    model = trained.settings.model
    parts = (
        f": {model.patch_embedding} patches of {model.patch}, {model.depth} blocks of width {model.width}, {model.attention} attention, "
        f"{model.feed_forward} feed-forward, {model.pooling} pooling"
        if model.architecture == "vit"
        else ""
    )
    shown = ", ".join(trained.classes[:5]) + (", ..." if len(trained.classes) > 5 else "")
    return (
        f"The network `{model.architecture}`{parts}; {num_parameters(trained):,} parameters. It tells {len(trained.classes)} classes of "
        f"`{trained.facts['dataset']['name']}` ({shown}) apart in images of {trained.side} x {trained.side} pixels."
    )


def num_parameters(trained: TrainedModel) -> int:
    """Trainable ones, counted in a network without memory for its weights."""
    import torch

    from model import build_model
    from models.cost import count_parameters

    with torch.device("meta"):
        return count_parameters(build_model(trained.settings.model, len(trained.classes), trained.side))


def accuracy_table(results: list[dict[str, Any]], metrics: list[dict[str, Any]]) -> str:
    rows = [
        f"| {result['split']} | {100 * result['accuracy']:.2f}% ({result['correct']}/{result['seen']}) | {100 * result['top5_accuracy']:.2f}% | "
        f"{result['loss']:.4f} | `{result['weights']}` |"
        for result in results
    ]
    note = ("The last epoch counts, whatever the others gave. " if metrics else "") + (
        "The test split chose nothing: neither an epoch nor a setting is picked on it by these programs."
    )
    return "\n".join(["| split | top 1 | top 5 | loss | weights |", "|---|---|---|---|---|", *rows, "", note])


def training(trained: TrainedModel, metrics: list[dict[str, Any]]) -> str:
    """How the weights came about, and what to type to get them again."""
    facts = trained.facts
    dataset, engine = facts["dataset"], facts["settings"]["engine"]
    images = ", ".join(f"{count:,} {name}" for name, count in dataset["num_images"].items())
    seconds = sum(line["training_seconds"] for line in metrics)
    lines = {
        "command": f"`{shlex.join(shorter(word) for word in facts['command'])}`",
        "commit": facts["commit"][:12] + (", with uncommitted changes" if facts["uncommitted_changes"] else ""),
        "data": f"{dataset['name']}: {images} images; {dataset['fingerprint']}",
        "length": f"{metrics[-1]['step'] if metrics else 0:,} of {facts['total_steps']:,} steps of {engine['train_batch_size']} images "
        f"({len(metrics)} epochs), seed {facts['seed']}, {seconds:,.0f} s of training",
        "machine": f"{facts['num_processes']} x {facts['device']}, {facts['settings']['strategy']}, {facts['precision']}",
        "started from": facts["init_weights"] or "random weights",
        "versions": ", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
    }
    changed = "\n".join(
        f"{path.removeprefix('engine.')}={value!r}"
        for path, value, _ in changed_settings(facts["settings"])
        if value is not None
    )
    table = "\n".join([f"| {name} | {value} |" for name, value in lines.items()])
    return f"| | |\n|---|---|\n{table}\n\nSettings that differ from the defaults (`run.json` has all of them):\n\n```\n{changed}\n```"


def shorter(word: str) -> str:
    """A word of a command without the folders of one machine."""
    return Path(word).name if Path(word).is_absolute() else word


def use(trained: TrainedModel) -> str:
    """Commands, and five lines of Python; tests/test_model_card.py runs them."""
    folder = f"runs/{trained.name}"
    return f"""`{WEIGHTS}` holds plain fp32 tensors. From the project's folder, with its environment:

```bash
python evaluate.py {folder} --predict image.png
python evaluate.py {folder} --export onnx
```

```python
from inference.predict_images import fit, read_image
from inference.trained_model import TrainedModel

trained = TrainedModel.open("{folder}")
pixels = fit(read_image("image.png"), trained)[None]
print(trained.classes[trained.network()(trained.normalise(pixels)).argmax()])
```

The exported file needs nothing of this project:

```python
import json, numpy, onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession("{folder}/model.onnx")
image = ImageOps.fit(Image.open("image.png").convert("RGB"), ({trained.side}, {trained.side}), Image.BILINEAR)
scores = session.run(None, {{"images": numpy.array(image)[None]}})[0]
print(json.loads(session.get_modelmeta().custom_metadata_map["classes"])[scores.argmax()])
```

What the network saw: {trained.preprocessing_text}; scaled to 0..1, minus the mean {numbers(trained, "mean")}, divided by {numbers(trained, "std")}.
The exported graph takes the pixels (uint8, B x {trained.side} x {trained.side} x 3) and does the scaling itself."""


def numbers(trained: TrainedModel, name: str) -> str:
    return ", ".join(f"{value:.4f}" for value in trained.facts["dataset"][name])
