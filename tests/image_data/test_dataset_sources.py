"""Which source a folder was prepared from, and the command that prepares it again."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from trees import refusal, written

from common.errors import DatasetError
from common.paths import PROJECT
from image_data.dataset import KNOWN, PREPARED_FROM, Dataset, prepare_again
from image_data.preparation import prepare as prepare_module
from image_data.preparation import source as source_module
from image_data.preparation.downloads import SOURCES
from image_data.preparation.drawn_shapes import SHAPES
from image_data.preparation.prepare import find_or_prepare, prepare
from image_data.preparation.source import Source
from image_data.readers import FileReader
from prepare_dataset import main


def test_force_without_a_source_keeps_the_source_of_the_folder(tree, zipped, tmp_path, capsys):
    """The images of a user would otherwise be replaced by CIFAR-100, the default dataset."""
    small = {"side": 16, "train_per_class": 2, "test_per_class": 2}
    prepare(tmp_path / "pets", archive=zipped)
    prepare(tmp_path / "elsewhere", root=tree)
    prepare(tmp_path / "drawn", dataset="shapes", shapes=small)
    prepare(tree)
    before = {name: written(tmp_path / name) for name in ("pets", "elsewhere", "tree")}

    def force(name):
        return refusal(capsys, "--data-dir", tmp_path / name, "--force")

    assert f"was prepared from {zipped.name}. Use prepare_dataset.py --archive with its path" in force("pets")
    assert "was prepared from the image tree tree. Use prepare_dataset.py --root with its path" in force("elsewhere")
    assert prepare(tmp_path / "drawn", force=True, shapes=small).classes == sorted(SHAPES)
    (tree / "dataset.json").unlink()
    assert prepare(tree).classes == ["big dog", "cat"]
    assert {name: written(tmp_path / name) for name in before} == before
    (tmp_path / "pets/prepared_from.json").unlink()  # as earlier versions left it
    assert "its source is not recorded. Use prepare_dataset.py with --dataset, --archive or --root" in force("pets")


def test_force_keeps_the_test_fraction_of_the_tree_in_the_folder(tree):
    shutil.rmtree(tree / "test")
    for folder in (tree, tree / "train"):  # train/<class>/*.png, and <class>/*.png
        first = prepare(folder, test_fraction=0.4)
        assert prepare(folder, force=True).fingerprint == first.fingerprint
    shutil.copytree(tree / "train" / "cat", tree / "test" / "cat")
    shutil.copytree(tree / "train" / "big dog", tree / "test" / "big dog")
    assert len(prepare(tree, force=True).splits["test"]) == 6, "a test split that was added since"


def test_images_that_are_no_dataset_get_advice_and_are_not_joined_by_cifar100(tree, capsys):
    (tree / "train").rename(tree / "Train")
    for folder, advice in (
        (tree, "Rename Train to train"),
        (tree / "Train", "To split class folders into train and test, add --test-fraction 0.2 to prepare_dataset.py"),
        (tree.parent, f"Expected {tree.parent}/train/<class>/*.png"),
    ):
        before = sorted(tree.rglob("*"))
        assert advice in refusal(capsys, "--data-dir", folder)
        with pytest.raises(DatasetError, match=re.escape(advice)):
            find_or_prepare(folder, None, None)
        assert sorted(tree.rglob("*")) == before
    assert main(["--data-dir", str(tree / "Train"), "--test-fraction", "0.4"]) == 0


def test_a_preparation_that_was_interrupted_is_not_taken_for_a_tree(zipped, tmp_path):
    prepare(tmp_path, archive=zipped)
    (tmp_path / "dataset.json").unlink()
    with pytest.raises(DatasetError, match=f"prepared from {zipped.name}. Use prepare_dataset.py --archive"):
        find_or_prepare(tmp_path, None, None)


def test_a_folder_of_other_images_is_not_taken_for_a_named_dataset(tree, zipped, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(source_module, "DATA", tmp_path)
    monkeypatch.setattr(prepare_module, "DATA", tmp_path)
    prepare(tree)
    prepare(tmp_path / "shapes", archive=zipped)
    for data_dir, dataset in ((tree, "cifar100"), (None, "shapes")):
        with pytest.raises(DatasetError, match=f"and --dataset {dataset} would be ignored. Choose another --data-dir"):
            find_or_prepare(data_dir, dataset, None)
    (tree / "prepared_from.json").write_text('{"dataset": "cifar100"}')  # as earlier versions recorded a tree in place
    with pytest.raises(DatasetError, match="was prepared from tree, and --dataset cifar100"):
        find_or_prepare(tree, "cifar100", None)
    with pytest.raises(DatasetError, match=f"--archive {tmp_path} is not a file. Check the path"):
        find_or_prepare(tree, None, tmp_path)
    prepare(archive=shutil.copy(zipped, tmp_path / "cifar100.zip"))
    assert find_or_prepare(None, "cifar100", None) == tmp_path / "cifar100"


def test_the_command_that_prepares_a_missing_dataset_names_its_source(tree, tmp_path):
    assert tuple(SOURCES) == KNOWN
    for folder, command in (
        (tree, f"--data-dir {tree}"),
        (tmp_path / "shapes", "/shapes --dataset shapes"),
        (tmp_path / "pets", "/pets --archive FILE (or --root DIR, or --dataset NAME)"),
    ):
        with pytest.raises(DatasetError) as error:
            Dataset.open(folder)
        assert str(error.value).endswith(command)


def test_the_command_that_prepares_a_dataset_again_is_complete(tree, zipped, tmp_path):
    """Each was refused before, since --force alone does not find these sources."""
    out = tmp_path / "my pets"
    for sources, options in (
        ({"archive": zipped}, f"--archive PATH/{zipped.name}"),
        ({"root": tree}, f"--root {tree}"),
        ({"root": tree / "train", "test_fraction": 0.4}, f"--root {tree}/train --test-fraction 0.4"),
    ):
        prepare(out, **sources, force=True)
        assert prepare_again(out) == f"python prepare_dataset.py --data-dir '{out}' {options} --force"
    reader = FileReader([tree / "gone.png"], 1, out)
    shutil.move(tree, tmp_path / "elsewhere")
    again = f"prepare_dataset.py --data-dir '{out}' --root NEW_PLACE --test-fraction 0.4 --force"
    with pytest.raises(DatasetError, match=f"Restore the file, or run: python {again}"):
        reader.read(np.array([0]))


def test_the_command_that_replaces_another_source_is_quoted(tree, zipped, tmp_path):
    prepare(tmp_path / "my pets", root=tree)
    again = f"--data-dir '{tmp_path}/my pets' --archive '{tmp_path}/my pets.zip' --force"
    with pytest.raises(DatasetError, match=f"python prepare_dataset.py {again}"):
        find_or_prepare(tmp_path / "my pets", None, zipped.rename(tmp_path / "my pets.zip"))


def test_a_dataset_is_prepared_where_train_py_looks_for_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for source, name in ((Source("shapes", None, None), "shapes"), (Source(None, Path("pets.zip"), None), "pets")):
        assert source.default_folder() == PROJECT / "data" / name


def test_a_record_of_the_source_that_is_no_object_is_left_out(tree):
    prepare(tree)
    (tree / PREPARED_FROM).write_text("null")
    assert source_module.recorded(tree) == {}


def test_train_py_does_not_prepare_another_archive_as_cifar100(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "DATA", tmp_path)
    with pytest.raises(
        DatasetError, match=r"pets.zip would be prepared in .*cifar100, the folder of CIFAR-100. Add --d"
    ):
        find_or_prepare(None, None, Path("pets.zip"))
    with pytest.raises(DatasetError, match=r"cifar-100-python.tar.gz does not exist"):
        find_or_prepare(None, None, Path("cifar-100-python.tar.gz"))
