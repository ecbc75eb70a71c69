"""evaluate.py --export onnx and the model card: the file gives the results of the run, the card's code works."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from programs import run
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import evaluate
from benchmarks.lib.forked_programs import Done
from common.errors import RunError
from common.paths import PROJECT
from config.settings import ModelSettings
from image_data.dataset import Dataset
from inference import model_card, onnx_export
from inference.model_card import use, write_card
from inference.predict_images import fit, read_image
from inference.trained_model import TrainedModel
from model import TABLES, build_model
from records.provenance import commit_text
from records.run_folder import RunFolder

onnxruntime = pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def exported(unbroken, tmp_path_factory) -> tuple[Done, TrainedModel]:
    """The output of an export, and the exported run."""
    folder = shutil.copytree(
        unbroken.folder, tmp_path_factory.mktemp("exported") / "runs" / "mine", ignore=shutil.ignore_patterns("state")
    )
    return run("evaluate.py", folder, "--export", "onnx"), TrainedModel.open(folder)


def session(trained: TrainedModel):
    return onnxruntime.InferenceSession(trained.record.folder / "model.onnx")


@pytest.mark.parametrize("batch_size", [1, 7, 70])
def test_the_exported_file_has_the_accuracy_of_the_run_on_raw_pixels(exported, unbroken, shapes, batch_size):
    test, network = Dataset.open(shapes).splits["test"], session(exported[1])
    pixels = np.asarray(test.pixels()[test.rows])
    best = [network.run(None, {"images": part})[0].argmax(1) for part in np.split(pixels, len(pixels) // batch_size)]
    assert (np.concatenate(best) == test.labels).sum() == unbroken.metrics()[-1]["test_correct"]


def test_the_export_prints_difference_and_shapes(exported):
    said = exported[0].out
    assert "against PyTorch on 70 test images" in said and "top-1 equal on 70 of 70" in said
    assert float(re.search(r"differ by (\S+) at most", said)[1]) < 1e-4
    assert "images uint8 (B, 32, 32, 3) -> scores float32 (B, 10), any batch size B" in said


def test_the_file_has_metadata_and_no_path_of_this_machine(exported, unbroken, tmp_path_factory):
    trained = exported[1]
    network, facts = session(trained), unbroken.facts()
    (images,), (scores,) = network.get_inputs(), network.get_outputs()
    assert (images.name, images.type, images.shape) == ("images", "tensor(uint8)", ["B", 32, 32, 3])
    assert (scores.name, scores.type, scores.shape) == ("scores", "tensor(float)", ["B", 10])
    said = network.get_modelmeta().custom_metadata_map
    assert (
        json.loads(said["classes"]) == facts["dataset"]["classes"]
        and said["dataset_fingerprint"] == facts["dataset"]["fingerprint"]
    )
    content = (trained.record.folder / "model.onnx").read_bytes()
    assert not any(
        str(path).encode() in content for path in (PROJECT, Path.home(), tmp_path_factory.getbasetemp(), sys.prefix)
    )


def test_weights_have_metadata(unbroken):
    with safe_open(unbroken.folder / "weights.safetensors", "np") as file:
        said, facts = json.loads(file.metadata()["trained"]), unbroken.facts()
    assert (
        json.loads(said["classes"]) == facts["dataset"]["classes"]
        and json.loads(said["model"]) == facts["settings"]["model"]
    )
    assert (
        json.loads(said["mean"]) == facts["dataset"]["mean"]
        and said["image_side"] == "32"
        and said["commit"] == (facts["commit"] or "unknown")
    )


# --- networks without ONNX form -----------------------------------------------------------------------------------


class Spectrum(nn.Module):
    """Has an operation without ONNX form."""

    def forward(self, x):
        return x + torch.linalg.eigvalsh(x.transpose(1, 2) @ x)[:, None]


class Dice(nn.Module):
    """Gives another result each time."""

    def forward(self, x):
        return x + torch.rand_like(x)


def with_part(trained: TrainedModel, part: nn.Module) -> TrainedModel:
    """Return the run with one layer of its network replaced."""
    network = trained.network()
    network[1] = part

    class Changed(TrainedModel):
        def network(self, *_):
            return network

    return Changed(trained.record, trained.facts)


@pytest.mark.parametrize(
    ("part", "sentence"),
    [
        (Spectrum(), "cannot be exported to ONNX: PyTorch's operation aten._linalg_eigh has no ONNX form"),
        (
            Dice(),
            "the exported network gives other results than the trained one: against PyTorch on 32 images of noise",
        ),
    ],
    ids=["no form", "another result"],
)
def test_a_network_that_does_not_export_is_one_sentence_and_no_file(exported, tmp_path, capfd, part, sentence):
    with pytest.raises(RunError) as refusal:
        checked = onnx_export.pixels_to_check(exported[1], None)
        onnx_export.export(with_part(exported[1], part), "weights.safetensors", tmp_path / "model.onnx", *checked)
    assert sentence in str(refusal.value) and "\n" not in str(refusal.value)
    assert not list(tmp_path.iterdir()) and capfd.readouterr() == ("", "")


def test_a_test_image_that_is_missing_is_named_and_not_the_output(exported, shapes, tmp_path, monkeypatch):
    folder = shutil.copytree(shapes, tmp_path / "moved")
    facts = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**facts, "packed": False, "root": "elsewhere"}))
    given, output = exported[1], tmp_path / "model.onnx"
    done = run("evaluate.py", given.record.folder, "--export", "onnx", "--output", output, "--data-dir", folder, code=1)
    assert f"{folder}/elsewhere/test/" in done.err and "cannot be read (No such file" in done.err

    checked = []
    monkeypatch.setattr(onnx_export, "export", lambda trained, weights, output, pixels, what: checked.append(what))
    trained = TrainedModel(given.record, {**given.facts, "dataset": {**given.facts["dataset"], "folder": str(folder)}})
    args = Namespace(export="onnx", output=output, data_dir=None, weights="weights.safetensors")
    assert evaluate.export_network(trained, args) == 0 and checked == ["images of noise (no test images found)"]


TINY = ModelSettings(patch=4, width=16, depth=1, heads=2, head_size=8, feed_forward_options={}, dropout=0.0)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, table in TABLES.items() for name in table])
def test_every_entry_of_every_table_exports(kind, name, exported):
    side = 16 if kind != "architecture" else 128 if "iformer" in name else 32
    settings = (
        replace(TINY, **{kind: name}) if kind != "architecture" or name == "vit" else ModelSettings(architecture=name)
    )
    network = onnx_export.FromPixels(build_model(settings, 5, side), exported[1]).eval()
    content = onnx_export.to_onnx(network, side).model_proto.SerializeToString()
    pixels = np.random.default_rng(0).integers(0, 256, (3, side, side, 3), dtype=np.uint8)
    assert "top-1 equal on 3 of 3" in onnx_export.compare(network, content, pixels, "images of noise")


# --- the model card -----------------------------------------------------------------------------------------------


def text_of(record: RunFolder) -> str:
    return (record.folder / "README.md").read_text()


def test_the_card_of_a_finished_run_has_its_counts_and_its_provenance(unbroken):
    text, facts, last = text_of(unbroken), unbroken.facts(), unbroken.metrics()[-1]
    assert f"| test | {100 * last['test_accuracy']:.2f}% ({last['test_correct']}/{last['test_seen']}) |" in text
    assert (
        commit_text(facts, 12) in text
        and facts["dataset"]["fingerprint"] in text
        and f"{last['step']} of {last['step']} steps" in text
    )
    assert (
        "model.width=32" in text and "optimizer.params.lr=0.003" in text and "model.dropout" not in text
    )  # what differs, nothing else
    assert not re.search(r"(?<![\w:/])/(home|tmp|work|root|usr|var|private)/", text)


def test_the_head_of_the_card_is_yaml_that_hubs_read(unbroken):
    yaml = pytest.importorskip("yaml")
    said = yaml.safe_load(text_of(unbroken).split("---")[1])
    (result,) = said["model-index"][0]["results"]
    assert said["pipeline_tag"] == "image-classification"
    assert result["metrics"][0]["value"] == round(100 * unbroken.metrics()[-1]["test_accuracy"], 2)


def test_the_card_names_the_weights_of_an_evaluation(exported):
    record = RunFolder(shutil.copytree(exported[1].record.folder, exported[1].record.folder.with_name("other")))
    shutil.copy(record.folder / "weights.safetensors", record.folder / "best.safetensors")
    weights = load_file(record.folder / "best.safetensors")
    save_file({name: 0 * value for name, value in weights.items()}, record.folder / "best.safetensors")
    run("evaluate.py", record.folder, "--weights", "best.safetensors")
    text, last = text_of(record), record.metrics()[-1]
    assert "| `best.safetensors` |" in text and "# other\n" in text
    assert "`best.safetensors`: the weights of the epoch with the best validation accuracy." in text
    # The published accuracy stays that of weights.safetensors, which the card's programs load.
    assert "| `weights.safetensors` |" in text and "`weights.safetensors`: the weights after the last epoch" in text
    (metric,) = json.loads(re.search("model-index: (.*)", text)[1])[0]["results"][0]["metrics"]
    assert metric["value"] == round(100 * last["test_accuracy"], 2)
    record.write_metrics(
        "".join(json.dumps(line) + "\n" for line in record.metrics()[:-1])
    )  # as when that epoch is trained again
    write_card(record)
    assert "| `best.safetensors` |" not in text_of(record)


def test_odd_names_do_not_break_the_card(unbroken, tmp_path):
    yaml = pytest.importorskip("yaml")
    folder = shutil.copytree(unbroken.folder, tmp_path / 'a$x_{"|`*b*', ignore=shutil.ignore_patterns("state"))
    facts = json.loads((folder / "run.json").read_text())
    facts["dataset"]["classes"][:3] = ["<img src=x>", "a|b", "*c*\x1b[31m"]
    facts["dataset"]["name"] = "my `data` | set"
    facts["commit"] = None
    (folder / "run.json").write_text(json.dumps(facts))
    text = write_card(RunFolder(folder)).read_text()
    assert yaml.safe_load(text.split("---")[1])["datasets"] == ["my `data` | set"]
    assert r"\<img src=x\>, a\|b, \*c\*" in text and "\x1b" not in text and "``my `data` \\| set``" in text
    assert "| commit | unknown |" in text and r'# a\$x\_\{"\|\`\*b\*' in text
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        compile(block, "card", "exec")
    for line in re.search(r"```bash\n(.*?)```", text, re.DOTALL)[1].splitlines():
        assert shlex.split(line)[2] == f"runs/{folder.name}"


def test_the_code_and_the_commands_of_the_card_run(exported, shapes, monkeypatch, capsys):
    folder = exported[1].record.folder.parent.parent
    monkeypatch.chdir(folder)
    dataset = Dataset.open(shapes)
    shutil.copy(dataset.root / dataset.splits["test"].paths[0], "image.png")
    text = text_of(exported[1].record)
    for code in (blocks := re.findall(r"```python\n(.*?)```", text, re.DOTALL)):
        exec(code, {})
    said = capsys.readouterr().out.split()
    assert len(blocks) == 2 and len(said) == 2 and said[0] == said[1] and said[0] in dataset.classes
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    for line in lines:
        monkeypatch.setattr(sys, "argv", shlex.split(line)[1:])
        assert (folder / evaluate.parse_arguments().runs[0] / "run.json").is_file()


@pytest.mark.parametrize("dataset_side", [32, None])
def test_the_program_of_the_card_preprocesses_as_evaluation_does(exported, tmp_path, monkeypatch, dataset_side):
    facts = exported[1].facts | {"dataset": exported[1].facts["dataset"] | {"image_side": dataset_side}}
    facts["settings"] = facts["settings"] | {"image_side": 32}
    trained = TrainedModel(exported[1].record, facts)
    program = re.findall(r"```python\n(.*?)```", use(trained), re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    sideways = Image.Exif()
    sideways[0x0112] = 6
    coarse = np.random.default_rng(0).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    for width, height in ((75, 53), (53, 75), (32, 32), (33, 47)):
        image = Image.fromarray(coarse).resize((width, height), Image.BICUBIC)
        image.save("image.png", exif=sideways)
        names = {"Image": Image, "ImageOps": ImageOps}
        exec(program[program.index("image = ") : program.index("scores = ")], names)
        expected = fit(read_image("image.png"), trained).astype(int)
        assert np.abs(np.asarray(names["image"]) - expected).max() <= 2


def test_the_card_names_a_run_of_a_comparison_with_its_folder(exported, tmp_path, monkeypatch):
    monkeypatch.setattr(model_card, "RUNS", tmp_path)
    shutil.copytree(exported[1].record.folder, tmp_path / "muon/seed0")
    text = write_card(RunFolder(tmp_path / "muon/seed0")).read_text()
    assert "python evaluate.py runs/muon/seed0 --predict" in text and 'open("runs/muon/seed0")' in text
