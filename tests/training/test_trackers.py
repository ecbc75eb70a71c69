"""training/trackers.py: the same numbers under the same names everywhere, also in a resumed run.

Run: python -m pytest tests/training/test_trackers.py
"""

from __future__ import annotations

import io
import json
import shutil
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import programs
import pytest
import torch

from common.errors import RunError, SettingsError
from common.files import read_lines
from records.run_folder import RunFolder
from training.console import Console
from training.experiment_trackers import MLflow, WeightsAndBiases
from training.tensorboard_tracker import CHARTS, TensorBoard, hyperparameters, tag_of
from training.tracker import Tracker, numbers_of
from training.trackers import RunIndex, StepLosses, Tracking, check_trackers, start_tracking

FACTS = {
    "settings": {"epochs": 3},
    "command": ["train.py", "--name", "x"],
    "commit": "abc",
    "versions": {"torch": "2"},
    "preset": "tiny",
    "seed": 0,
    "dataset": {"name": "shapes"},
    "device": "CPU",
    "total_steps": 100,
}


def events(folder: Path):
    """Return what TensorBoard reads from a run folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    found.Reload()
    return found


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    found = events(folder)
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


# --- TensorBoard --------------------------------------------------------------------------------------------------


def test_tensorboard_has_the_numbers_of_metrics_under_their_names(unbroken):
    lines, shown = unbroken.metrics(), scalars(unbroken.folder)
    assert set(shown) == {tag_of(name) for name in {*lines[0], "step_loss"} - {"step"}}
    for tag in set(shown) - {"loss/step_loss"}:
        name = tag.split("/")[1]
        assert [step for step, _ in shown[tag]] == [line["step"] for line in lines]
        assert [value for _, value in shown[tag]] == pytest.approx([line[name] for line in lines], rel=1e-6)
    steps, losses = read_lines(unbroken.folder / "steps.jsonl"), shown["loss/step_loss"]
    assert [step for step, _ in losses] == [line["step"] for line in steps]
    assert [value for _, value in losses] == pytest.approx([line["step_loss"] for line in steps], rel=1e-6)


def test_accuracy_and_loss_are_the_first_groups(unbroken):
    """TensorBoard orders groups by name."""
    names = {tag.split("/")[1]: tag.split("/")[0] for tag in scalars(unbroken.folder)}
    assert sorted(set(names.values())) == ["accuracy", "loss", "optimizer", "other", "speed", "system"]
    expected = {"accuracy": "test_accuracy", "loss": "train_loss", "speed": "images_per_second", "system": "memory_gib"}
    assert {group: names[name] for group, name in expected.items()} == {group: group for group in expected}


def test_the_hparams_tab_has_the_changed_settings_and_reads_accuracy_and_loss(unbroken):
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    data = events(unbroken.folder).SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    values = HParamsPluginData.FromString(data).session_start_info.hparams
    assert (values["model.width"].number_value, values["seed"].number_value) == (32, 0)
    assert values["preset"].string_value == "tiny" and values["train_batch_size"].number_value == 64
    assert set(values) == set(hyperparameters(unbroken.facts())) and len(values) < 60
    data = events(unbroken.folder).SummaryMetadata("_hparams_/experiment").plugin_data.content
    shown = {info.name.tag for info in HParamsPluginData.FromString(data).experiment.metric_infos}
    assert {"accuracy/test_accuracy", "loss/test_loss", "loss/train_loss"} == shown <= set(scalars(unbroken.folder))


def test_a_resumed_run_of_an_earlier_version_keeps_its_tags(tmp_path):
    """Otherwise its curves would break in two."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(tmp_path / "tensorboard"))
    writer.add_custom_scalars({"this run": {"accuracy": ["Multiline", [r".*_accuracy$"]]}})
    writer.add_scalar("train_loss", 2.0, 4)
    writer.close()
    resumed = TensorBoard(tmp_path, FACTS, step=4)
    resumed.epoch({"step": 8, "train_loss": 1.0})
    resumed.close(failed=False)
    assert scalars(tmp_path) == {"train_loss": [(4, 2.0), (8, 1.0)]}


def test_tensorboard_takes_a_path_that_is_not_utf8(tmp_path):
    """The command and the preset may name one; it ended the run at its start."""
    facts = {**FACTS, "command": ["train.py", "--data-dir", "caf\udce9"], "preset": "caf\udce9.toml"}
    TensorBoard(tmp_path, facts, step=0).close(failed=False)
    (text,) = events(tmp_path).Tensors("command/text_summary")
    assert "--data-dir caf\ufffd" in text.tensor_proto.string_val[0].decode()


def test_a_tensorboard_that_cannot_start_is_a_warning(tmp_path, capsys):
    (tmp_path / "tensorboard").write_text("a file in its place")
    chosen = {"tensorboard": True, "wandb": None, "mlflow": None, "group": None, "report": False}
    tracking = start_tracking(tmp_path, FACTS, 0, Console(out=sys.stdout), **chosen)
    tracking.__exit__(None, None, None)
    assert "warning: TensorBoard is disabled (" in capsys.readouterr().out
    assert not any(isinstance(tracker, TensorBoard) for tracker in tracking.trackers)


def test_tensorboard_shows_the_first_batch_and_the_settings(unbroken, shapes):
    from PIL import Image

    from config.settings import Settings
    from dali_pipeline import Batches
    from image_data.dataset import Dataset
    from image_data.pixels import denormalize

    found = events(unbroken.folder)
    (image,) = found.Images("first_batch")
    sheet = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)))
    dataset = Dataset.open(shapes)
    settings = Settings.from_dict(unbroken.facts()["settings"])
    batches = Batches(dataset, "train", 64, seed=0, augmentation=settings.augmentation)
    first = denormalize(next(batches.epoch(0))[0], dataset.mean, dataset.std)
    batches.close()
    S, gap = 32, 2
    assert sheet.shape == (8 * (S + gap), 8 * (S + gap), 3)
    np.testing.assert_array_equal(sheet[gap : gap + S, gap : gap + S], first[0])
    np.testing.assert_array_equal(sheet[-S:, -S:], first[63])
    (text,) = found.Tensors("settings/text_summary")
    assert '"train_batch_size": 64' in text.tensor_proto.string_val[0].decode()


def test_custom_scalars_group_related_numbers(unbroken):
    import re

    names = [
        name
        for name in scalars(unbroken.folder)
        if any(re.fullmatch(tag, name) for tags in CHARTS.values() for tag in tags)
    ]
    assert {
        "loss/train_loss",
        "loss/test_loss",
        "loss/step_loss",
        "accuracy/test_accuracy",
        "accuracy/test_top5_accuracy",
        "optimizer/learning_rate",
        "speed/training_seconds",
    } <= set(names)
    assert "custom_scalars__config__" in events(unbroken.folder).Tags()["tensors"]


def test_events_of_epochs_that_are_trained_again_are_purged(tmp_path):
    first = TensorBoard(tmp_path, FACTS, step=0)
    for step in (4, 8, 12):
        first.epoch({"step": step, "train_loss": 1.0 + step})
        first.loss(step, float(step), 4)
    first.close(failed=True)
    second = TensorBoard(tmp_path, FACTS, step=6)
    second.epoch({"step": 8, "train_loss": 0.5})
    second.close(failed=False)
    assert scalars(tmp_path) == {"loss/train_loss": [(4, 5.0), (8, 0.5)], "loss/step_loss": [(4, 4.0)]}
    assert len(events(tmp_path).Tensors("settings/text_summary")) == 1


def test_a_run_resumed_from_an_older_checkpoint_logs_what_an_uninterrupted_one_does(training, runs, unbroken):
    record = RunFolder(runs / "went-back")
    programs.run("train.py", *training, "--name", "went-back", "--stop-at", 7, code=75)
    programs.run("train.py", *training, "--name", "went-back", "--stop-at", 10, code=75)
    shutil.rmtree(record.folder / "state" / "step-00000010")
    assert scalars(record.folder)["loss/step_loss"][-1][0] == 10
    time.sleep(1.0)  # the names of event files count seconds
    printed = programs.run("train.py", *training, "--name", "went-back", "--stop-at", 13, code=75).out
    assert "resuming  after step 8" in printed
    for name in ("loss/step_loss", "loss/train_loss", "accuracy/test_accuracy", "optimizer/learning_rate"):
        expected = [event for event in scalars(unbroken.folder)[name] if event[0] <= 13]
        assert scalars(record.folder)[name] == expected, name
    assert read_lines(record.folder / "steps.jsonl") == read_lines(unbroken.folder / "steps.jsonl")[:13]


# --- Weights & Biases, replaced by a module that records the calls ------------------------------------------------


class Service(ModuleType):
    """The used part of the wandb package; it stores runs by their id, as the real service does."""

    def __init__(self):
        super().__init__("wandb")
        self.runs: dict[str, SimpleNamespace] = {}
        self.error: str | None = None
        self.errors = SimpleNamespace(Error=type("Error", (Exception,), {}))
        self.Settings, self.Image = SimpleNamespace, lambda pixels: pixels.shape

    def init(self, **arguments) -> SimpleNamespace:
        if self.error:
            raise self.errors.Error(self.error)
        new = SimpleNamespace(arguments=arguments, logged=[], step=0, finished=None)
        run = self.runs.setdefault(arguments["id"], new)

        def log(numbers: dict, step: int) -> None:
            assert step >= run.step, "wandb rejects earlier steps"
            run.step = step
            run.logged.append((step, numbers))

        run.log, run.finish = log, lambda exit_code: setattr(run, "finished", exit_code)
        return run


@pytest.fixture
def service(monkeypatch) -> Service:
    made = Service()
    monkeypatch.setitem(sys.modules, "wandb", made)
    return made


def test_weights_and_biases_logs_the_numbers_of_metrics(service, unbroken, tmp_path):
    tracker = WeightsAndBiases(tmp_path, FACTS, 0, "project", silent=True)
    tracker.batch(np.zeros((2, 2, 4, 4, 3), dtype=np.uint8))
    for line in unbroken.metrics():
        tracker.loss(line["step"], 0.25, 4)
        tracker.epoch(line)
    tracker.close(failed=False)
    (run,) = service.runs.values()
    assert run.logged[0] == (0, {"first_batch": (10, 10, 3)}) and run.logged[1] == (4, {"step_loss": 0.25})
    assert run.logged[2::2] == [
        (line["step"], {key: value for key, value in line.items() if key != "step"}) for line in unbroken.metrics()
    ]
    assert (
        run.arguments["project"] == "project"
        and run.arguments["name"] == tmp_path.name
        and run.arguments["config"]["settings"] == {"epochs": 3}
    )
    assert run.finished == 0


def test_gradients_cost_no_losses_of_earlier_steps(service, tmp_path):
    """They are told before the losses of the same time, as training/step_log.py does."""
    tracker = WeightsAndBiases(tmp_path, FACTS, 0, None, silent=True)
    tracker.gradients(2, {"gradient_norm": 0.5})  # of a step that was skipped
    tracker.gradients(4, {"gradient_norm": 0.7})
    for step in (1, 3, 4, 5):
        tracker.loss(step, 1.0, 1)
    (run,) = service.runs.values()
    assert [step for step, _ in run.logged] == [1, 2, 3, 4, 5]
    assert run.logged[1] == (2, {"gradient_norm": 0.5})
    assert run.logged[3] == (4, {"step_loss": 1.0, "gradient_norm": 0.7})


def test_a_resumed_run_continues_the_same_wandb_run_and_logs_no_step_twice(service, tmp_path):
    WeightsAndBiases(tmp_path, FACTS, 0, None, silent=True).epoch({"step": 8, "train_loss": 1.0})
    again = WeightsAndBiases(tmp_path, FACTS, 4, None, silent=True)
    again.epoch({"step": 6, "train_loss": 1.5})
    again.epoch({"step": 12, "train_loss": 0.5})
    (run,) = service.runs.values()
    assert run.logged == [(8, {"train_loss": 1.0}), (12, {"train_loss": 0.5})]
    WeightsAndBiases(tmp_path, FACTS, 0, None, silent=True, group="pairs/mlp")  # the run starts over
    assert len(service.runs) == 2 and list(service.runs.values())[1].arguments["group"] == "pairs/mlp"


def test_weights_and_biases_that_cannot_be_used_is_one_sentence(service, tmp_path, monkeypatch):
    service.error = "No API key configured.\nmore lines"
    with pytest.raises(
        RunError,
        match=r"^Weights & Biases reports 'No API key configured.'. To log to this disk only, set WANDB_MODE=offline$",
    ):
        WeightsAndBiases(tmp_path, FACTS, 0, None, silent=True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        SettingsError, match="--wandb needs the package wandb, which is not installed: pip install wandb"
    ):
        check_trackers(tensorboard=False, wandb="")
    with pytest.raises(
        SettingsError, match="^--mlflow needs the package mlflow, which is not installed: pip install mlflow$"
    ):
        check_trackers(tensorboard=False, wandb=None, mlflow="mine")
    with pytest.raises(SettingsError, match="--no-tensorboard"):
        check_trackers(tensorboard=True, wandb=None)
    check_trackers(tensorboard=False, wandb=None)


# --- MLflow, replaced by a store in memory; where mlflow is installed, the real one in SQLite -----------------------


class Store:
    """The used part of MlflowClient."""

    def __init__(self):
        self.uri, self.error = "", None
        self.experiments: dict[str, SimpleNamespace] = {}
        self.runs: dict[str, SimpleNamespace] = {}

    def __call__(self, uri: str) -> Store:
        self.uri = uri
        if self.error:
            raise self.error
        return self

    def get_experiment_by_name(self, name: str):
        return self.experiments.get(name)

    def create_experiment(self, name: str) -> str:
        self.experiments[name] = SimpleNamespace(experiment_id=str(len(self.experiments)))
        return self.experiments[name].experiment_id

    def create_run(self, experiment: str, run_name: str, tags: dict):
        run = SimpleNamespace(name=run_name, tags=tags, status="RUNNING", params={}, metrics=[], experiment=experiment)
        self.runs[f"id{len(self.runs)}"] = run
        return SimpleNamespace(info=SimpleNamespace(run_id=f"id{len(self.runs) - 1}"))

    def update_run(self, run_id: str, status: str) -> None:
        self.runs[run_id].status = status

    set_terminated = update_run

    def log_batch(self, run_id: str, metrics=(), params=()) -> None:
        assert len(params) <= 100, "MLflow rejects longer lists"
        self.runs[run_id].params |= dict(params)
        self.runs[run_id].metrics += [(name, value, step) for name, value, _, step in metrics]

    def get_run(self, run_id: str):
        return SimpleNamespace(data=SimpleNamespace(metrics={name for name, _, _ in self.runs[run_id].metrics}))

    def get_metric_history(self, run_id: str, name: str):
        return [SimpleNamespace(step=step) for known, _, step in self.runs[run_id].metrics if known == name]


@pytest.fixture
def store(monkeypatch) -> Store:
    made, error = Store(), type("MlflowException", (Exception,), {})
    modules = {
        "mlflow": {"MlflowClient": made},
        "mlflow.exceptions": {"MlflowException": error},
        "mlflow.entities": {"Metric": lambda *words: words, "Param": lambda *words: words},
    }
    for name, members in modules.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return made


def test_mlflow_logs_settings_and_numbers_and_a_resumed_run_continues(store, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    first = MLflow(folder, FACTS | {"settings": {f"s{i}": i for i in range(150)}}, 0, "work", group="pairs/mlp")
    first.loss(4, 2.0, 4)
    first.epoch({"step": 4, "train_loss": 1.5, "epoch": 1})
    first.close(failed=True)
    assert store.uri == f"sqlite:///{tmp_path}/mlflow.db" and store.runs["id0"].status == "FAILED"
    again = MLflow(folder, FACTS, 2, "work")
    for step in (4, 8):  # step 4 is trained again
        again.loss(step, 0.5, 4)
        again.epoch({"step": step, "train_loss": 0.25, "epoch": step // 4})
    again.close(failed=False)
    (run,) = store.runs.values()
    assert run.metrics == [
        ("step_loss", 2.0, 4),
        ("train_loss", 1.5, 4),
        ("epoch", 1.0, 4),
        ("step_loss", 0.5, 8),
        ("train_loss", 0.25, 8),
        ("epoch", 2.0, 8),
    ]
    assert (run.name, run.tags, run.status) == ("mine", {"group": "pairs/mlp"}, "FINISHED")
    assert run.params["s149"] == "149" and run.params["command"] == "train.py --name x"
    MLflow(folder, FACTS, 0, "work")  # the run starts over
    assert len(store.runs) == 2 and len(store.experiments) == 1


def test_an_mlflow_store_that_cannot_be_used_is_one_sentence(store, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://nowhere")
    store.error = sys.modules["mlflow.exceptions"].MlflowException("no route to host\nmore lines")
    with pytest.raises(RunError, match=r"^MLflow reports 'no route to host'. Set MLFLOW_TRACKING_URI to a store"):
        MLflow(tmp_path, FACTS, 0, "work")
    assert store.uri == "http://nowhere"


def test_the_real_mlflow_takes_what_is_logged(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / "mine"
    folder.mkdir()
    for step in (0, 4):
        tracker = MLflow(folder, FACTS, step, "work", group="pairs/mlp")
        tracker.loss(4, 2.0, 4)
        tracker.epoch({"step": 4 + step, "train_loss": 1.5, "epoch": 1})
        tracker.close(failed=False)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("work").experiment_id])
    assert run.info.status == "FINISHED" and run.data.tags["group"] == "pairs/mlp"
    assert [point.step for point in client.get_metric_history(run.info.run_id, "train_loss")] == [4, 8]
    assert [point.step for point in client.get_metric_history(run.info.run_id, "step_loss")] == [4]


# --- all trackers -------------------------------------------------------------------------------------------------


class Recorder(Tracker):
    def __init__(self):
        self.received = []

    def loss(self, step: int, mean: float, steps: int) -> None:
        self.received.append((step, mean, steps))

    def epoch(self, line: dict) -> None:
        time.sleep(0.02)

    def close(self, failed: bool) -> None:
        self.received.append("failed" if failed else "closed")


@pytest.mark.parametrize("failed", [False, True])
def test_the_index_of_the_runs_is_written_at_the_end_of_a_run(tmp_path, failed):
    with pytest.raises(ValueError, match="of the run") if failed else nullcontext():
        with Tracking([RunIndex(tmp_path / "run")]):
            assert not (tmp_path / "index.html").exists()
            if failed:
                raise ValueError("of the run")
    assert "<html" in (tmp_path / "index.html").read_text()


def test_losses_are_logged_as_means_and_none_is_lost():
    recorder = Recorder()
    tracking = Tracking([recorder], total_steps=5000)  # five steps a point
    losses = [(i, float(i)) for i in range(1, 24)]
    for start, stop in ((0, 3), (3, 6), (6, 7), (7, 23)):  # as they come from the device
        tracking.losses(losses[start:stop])
    assert recorder.received == [(5, 3.0, 5), (10, 8.0, 5), (15, 13.0, 5), (20, 18.0, 5)]
    tracking.losses([(4998, 0.0), (5000, 1.0)])  # between these, steps were skipped
    assert recorder.received[4:] == [(4998, 16.5, 4), (5000, 1.0, 1)]


def test_the_logging_overhead_is_returned_once():
    tracking = Tracking([Recorder()], seconds=0.5)
    assert tracking.take_seconds() == 0.5 and tracking.take_seconds() == 0
    tracking.epoch({"step": 1})
    assert 0.02 <= tracking.take_seconds() < 5


def test_trackers_learn_whether_the_run_failed():
    recorder = Recorder()
    with Tracking([recorder]):
        pass
    with pytest.raises(ZeroDivisionError), Tracking([recorder]):
        raise ZeroDivisionError
    assert recorder.received == ["closed", "failed"]


def test_a_tracker_that_fails_is_disabled_and_training_continues():
    class Full(Recorder):
        def epoch(self, line: dict) -> None:
            raise OSError(28, "No space left on device")

    printed, recorder = [], Recorder()
    with Tracking([Full(), recorder], say=printed.append) as tracking:
        tracking.epoch({"step": 1})
        tracking.losses([(2, 1.0)])
    assert printed == ["warning: Full is disabled (No space left on device); training continues"]
    assert recorder.received == [(2, 1.0, 1), "closed"] and tracking.trackers == [recorder]


def test_a_picture_that_cannot_be_drawn_ends_no_run():
    class Broken(Recorder):
        def epoch(self, line: dict) -> None:
            raise ValueError("cannot parse $x_{$")

    printed: list[str] = []
    with Tracking([Broken()], say=printed.append) as tracking:
        tracking.epoch({"step": 1})
    assert printed == ["warning: Broken is disabled (ValueError: cannot parse $x_{$); training continues"]


def test_without_trackers_nothing_is_made():
    Tracking([Recorder()]).first_batch(lambda: pytest.fail("nobody wants it"))
    tracking = Tracking([])
    tracking.first_batch(lambda: pytest.fail("nobody wants it"))
    tracking.losses([(1, 1.0)])
    tracking.epoch({"step": 1})
    assert tracking.take_seconds() < 0.1


def test_every_line_has_the_logging_overhead(unbroken):
    assert (
        all(line["tracking_seconds"] >= 0 for line in unbroken.metrics())
        and unbroken.metrics()[0]["tracking_seconds"] > 0
    )


def test_losses_of_repeated_steps_are_removed(tmp_path):
    first = StepLosses(tmp_path, 0)
    for step in (2, 4, 6):
        first.loss(step, float(step), 2)
    with (tmp_path / "steps.jsonl").open("a") as file:
        file.write('{"step": 8, "st')
    StepLosses(tmp_path, 4).loss(6, 0.5, 2)
    assert [(line["step"], line["step_loss"]) for line in read_lines(tmp_path / "steps.jsonl")] == [
        (2, 2.0),
        (4, 4.0),
        (6, 0.5),
    ]


def test_only_numbers_are_logged():
    assert numbers_of({"step": 3, "epoch": 1, "loss": 0.5, "name": "x", "list": [1]}) == {"epoch": 1, "loss": 0.5}


def test_no_tensorboard_and_no_report_options(training, runs):
    words = [*training, "--name", "plain-files", "--no-tensorboard", "--max-steps", 2]
    assert "--no-report" in words
    last = programs.run("train.py", *words).out.rstrip().splitlines()[-1]
    assert last.startswith("done") and last.endswith("plain-files")
    assert not {path.name for path in (runs / "plain-files").iterdir()} & {"tensorboard", "report.html", "curves.png"}
    assert [line["step"] for line in read_lines(runs / "plain-files" / "steps.jsonl")] == [1, 2]
    assert json.loads((runs / "plain-files" / "metrics.jsonl").read_text())["step"] == 2


@pytest.mark.parametrize("source", ["tensor", "resident", "files"])
def test_the_batch_that_is_logged_is_still_trained_on(shapes, source):
    from config.settings import AugmentationSettings
    from dali_pipeline import Batches
    from image_data.dataset import Dataset

    looked, fresh = (
        Batches(Dataset.open(shapes), "train", 64, augmentation=AugmentationSettings(), source=source) for _ in range(2)
    )
    next(looked.epoch(0, 0, 1))
    for (images, labels), (expected, expected_labels) in zip(looked.epoch(0), fresh.epoch(0), strict=True):
        assert torch.equal(images, expected) and torch.equal(labels, expected_labels)
    looked.close()
    fresh.close()
