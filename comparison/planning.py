"""From an experiment to its runs: the dataset's facts, the command of each run, shards, and seeds in rounds."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from common.errors import RunError, SettingsError
from common.paths import DATA, PROJECT, near_path
from common.stop_signal import StopSignal
from common.text import python_command
from comparison.experiment import Experiment, Variant
from comparison.planned_run import PlannedRun
from comparison.time_budget import calibrate
from records.run_folder import ASIDE, RunFolder


@dataclass(frozen=True)
class Data:
    """What planning needs to know about the dataset."""

    folder: Path
    num_train: int  # training images, without the validation split
    num_classes: int
    image_side: int
    fingerprint: str | None  # None if the dataset is not prepared yet


def dataset_facts(experiment: Experiment, data_dir: Path | None, is_dry_run: bool) -> Data:
    """Return the facts of the experiment's dataset, which is prepared first if necessary (not for a dry run).

    The folder and its number of classes are printed.

    Args:
        data_dir: folder of the prepared dataset, or an image tree that is prepared in place; None is data/<dataset>.

    Raises:
        SettingsError: the experiment's dataset is neither known nor the name of a prepared folder.
        DatasetError: the dataset cannot be prepared, or its folder was prepared from something else.
    """
    from image_data.dataset import KNOWN, Dataset  # not with the file, so that compare.py --help answers at once
    from image_data.preparation.prepare import find_or_prepare

    folder = (data_dir or DATA / experiment.dataset).resolve()
    is_known = experiment.dataset in KNOWN
    if not (is_known or data_dir or Dataset.is_prepared(folder)):
        prepare_it = python_command("prepare_dataset.py", "--root", "DIR", "--data-dir", near_path(folder))
        raise SettingsError(
            f"dataset = '{experiment.dataset}' is none of {', '.join(KNOWN)}, and {near_path(folder)} is not prepared; "
            f"prepare it: {prepare_it}"
        )
    if is_dry_run and not Dataset.is_prepared(folder):
        print(f"note: {near_path(folder)} is not prepared yet; the plan assumes a dataset of CIFAR's size")
        num_train = round(50_000 * (1 - experiment.hold_out))
        return Data(folder, num_train, 100 if experiment.dataset == "cifar100" else 10, 32, None)
    dataset = Dataset.open(find_or_prepare(folder, experiment.dataset if is_known and not data_dir else None, None))
    if experiment.hold_out:
        dataset = dataset.hold_out(experiment.hold_out)
    num_train, num_classes = len(dataset.splits["train"]), len(dataset.classes)
    print(f"data      {near_path(folder)}: {num_classes} classes, {num_train:,} training images")
    return Data(folder, num_train, num_classes, dataset.image_side or 0, dataset.fingerprint)


def data_of_runs(experiment: Experiment, runs: Path, data_dir: Path | None) -> Data:
    """Return the same facts from the existing runs, since a report needs no dataset.

    A run with the validation split and of a variant of the experiment is preferred. Folders that were renamed aside are
    passed over, and damaged ones.

    Raises:
        RunError: there is no such run.
    """
    names = "|".join(re.escape(variant.name) for variant in experiment.variants)
    present = re.compile(rf"((tuning|calibration)-)?({names})-.*")
    found: list[tuple[tuple[bool, bool], Data]] = []
    for path in sorted(runs.glob("*/run.json")):
        name = path.parent.name
        if re.search(rf"{re.escape(ASIDE)}\d+$", name):
            continue
        with suppress(RunError, KeyError, TypeError):
            facts = RunFolder(path.parent).facts()
            of_data = facts["dataset"]
            data = Data(
                (data_dir or PROJECT / of_data["folder"]).resolve(),
                of_data["num_images"]["train"],
                len(of_data["classes"]),
                of_data["image_side"] or 0,
                of_data["fingerprint"],
            )
            rank = (facts.get("hold_out") != (experiment.hold_out or None), not present.fullmatch(name))
            found.append((rank, data))
    if not found:
        raise RunError(f"{near_path(runs)} has no run to report on; leave out --report-only")
    return min(found, key=lambda one: one[0])[1]


Steps = Mapping[str, "int | None"]  # variant -> optimizer steps of a run; None where the budget is in epochs


def steps_by_variant(
    experiment: Experiment, data: Data, runs: Path, run: Callable[[list[PlannedRun]], dict[str, str]]
) -> tuple[Steps, dict[str, str]]:
    """Return the steps of each variant, and the calibration runs that failed, whose variants are left out.

    Args:
        run: makes the calibration runs that a budget in seconds needs.
    """
    if experiment.budget == "seconds":
        return calibrate(
            experiment, lambda variant, name, count: make_task(experiment, variant, 0, data, runs / name, count), run
        )
    count = int(experiment.budget_amount) if experiment.budget == "steps" else None
    return dict.fromkeys([variant.name for variant in experiment.variants], count), {}


def plan(experiment: Experiment, data: Data, runs: Path, steps: Steps) -> dict[tuple[str, int], PlannedRun]:
    """Return the runs by variant and seed, in the random order in which they are made.

    Args:
        steps: variants without an entry have no runs.
    """
    order = experiment.tasks()
    random.Random(experiment.name).shuffle(order)
    return {
        (one.name, seed): make_task(experiment, one, seed, data, runs / one.run_name(seed), steps[one.name])
        for one, seed in order
        if one.name in steps
    }


def run_until_decided(
    experiment: Experiment,
    data: Data,
    runs: Path,
    steps: Steps,
    run: Callable[[list[PlannedRun]], dict[str, str]],
    stop: StopSignal,
) -> tuple[Experiment, dict[tuple[str, int], PlannedRun], dict[str, str]]:
    """Run seeds in rounds until every variant is decided, hopeless, or has `max_seeds`; see comparison/sequential.py.

    Returns:
        The experiment with the number of seeds reached, its runs by variant and seed, and the runs that failed.
    """
    from comparison.results import accuracies_of
    from comparison.sequential import evaluate, plan_looks

    names = [variant.name for variant in experiment.variants]
    assert experiment.round_seeds is not None and experiment.max_seeds is not None  # until = "decided"
    looks, active = plan_looks(experiment.round_seeds, experiment.max_seeds), names[1:]
    failures: dict[str, str] = {}
    tasks: dict[tuple[str, int], PlannedRun] = {}
    for look in looks:
        reached = replace(experiment, seeds=look.seeds)
        planned = plan(reached, data, runs, steps)
        tasks |= {key: task for key, task in planned.items() if key[0] in (names[0], *active)}
        failures |= run([task for key, task in tasks.items() if key[0] in (names[0], *active)])
        outcome = evaluate(accuracies_of(reached, tasks), names[0], looks, experiment.margin, len(names) - 1)
        if stop.number or outcome.looks < look.number:
            break  # told to stop, or runs of the first variant failed
        for name in active:
            if name in outcome.differences:
                print(f"{name}: {outcome.differences[name].sentence}")
        active = outcome.active
        if not active:
            break
    return reached, tasks, failures


def share(
    experiment: Experiment, tasks: dict[tuple[str, int], PlannedRun], shard: tuple[int, int] | None
) -> dict[tuple[str, int], PlannedRun]:
    """Return the runs of shard I of N; None is all of them.

    Runs are dealt seed by seed, so that the shards differ by at most one run. A variant's runs with a seed and the next
    one are on two shards, since one machine must not make all of its runs: speeds are compared as well. Where the
    number of shards divides that of the variants, the deal therefore starts one variant later with each seed.
    """
    number, count = shard or (1, 1)
    variants = [variant.name for variant in experiment.variants]
    turn = 0 if len(variants) % count else 1

    def place(variant: str, seed: int) -> int:
        return seed * len(variants) + (variants.index(variant) + turn * seed) % len(variants)

    return {key: task for key, task in tasks.items() if place(*key) % count == number - 1}


def make_task(
    experiment: Experiment, variant: Variant, seed: int, data: Data, folder: Path, steps: int | None, row: str = ""
) -> PlannedRun:
    """Plan one run of train.py. With `steps` None, the budget is in epochs."""
    batch = variant.settings.engine["train_batch_size"]
    if data.num_train < batch:
        raise SettingsError(
            f"variant '{variant.name}': train_batch_size={batch} is more than the {data.num_train} training images; "
            "choose a smaller batch"
        )
    epochs = -(-steps // (data.num_train // batch)) if steps else int(experiment.budget_amount)
    hold_out = experiment.hold_out or None
    expected = {
        "settings": replace(variant.settings, epochs=epochs).as_dict(),
        "seed": seed,
        "max_steps": steps,
        "hold_out": hold_out,
        "fingerprint": data.fingerprint,
    }
    words = ["--preset", experiment.preset, "--data-dir", data.folder, "--runs-dir", folder.parent]
    words += ["--name", folder.name, "--seed", seed, "--epochs", epochs]
    words += ["--max-steps", steps] if steps else []
    words += ["--hold-out", hold_out] if hold_out else []
    words += ["--evaluate-every", experiment.evaluate_every] if experiment.evaluate_every else []
    words += [word for text in variant.overrides for word in ("--set", text)]
    if (scale := variant.settings.resizing.initial_scale) < 1:  # as given: a planned run must not turn it off
        words += ["--set", f"resizing.initial_scale={scale}"]
    group = folder.name if folder.name.startswith("calibration-") else variant.name
    return PlannedRun(folder.name, folder, [str(word) for word in words], expected, group, row)
