"""reports/page.py, pictures.py and style.py: the page needs no other file, and names cannot break it.

Run: python -m pytest tests/reports
"""

from __future__ import annotations

import base64
import json
import os
import re
from dataclasses import replace

from matplotlib.text import Text
from report_data import assert_stands_alone, some_confusion

from config.differences import changed_settings
from inference.evaluation import SplitResult, describe
from models.calibration import Calibration
from records.provenance import commit_text
from reports import curves, style
from reports.curves import several
from reports.evaluation import print_report
from reports.page import page, write_page
from reports.pictures import SplitAnalysis, pictures_of
from reports.style import save


def test_training_leaves_a_page(unbroken, done):
    text = (unbroken.folder / "report.html").read_text()
    assert_stands_alone(text, unbroken.folder)
    last = done.metrics[-1]
    assert (
        f"{100 * last['test_accuracy']:.2f}%" in text and f"{last['test_correct']:,} of {last['test_seen']:,}" in text
    )
    facts = done.facts
    assert commit_text(facts) in text and facts["dataset"]["fingerprint"] in text and "python train.py" in text
    assert len(re.findall("<img ", text)) == len(pictures_of(done, None))


def test_names_cannot_break_the_page(done):
    facts = json.loads(json.dumps(done.facts))
    facts["dataset"]["classes"] = ["<script>alert(1)</script>", "a & b", *facts["dataset"]["classes"][2:]]
    run = replace(done, name="<img src=x>", facts=facts)
    found = SplitAnalysis("test", some_confusion(10), [], "none")
    text = page(run, found, pictures_of(run, found))
    assert_stands_alone(text, run.folder)
    assert "&lt;script&gt;" in text and "a &amp; b" in text and "<title>&lt;img" in text


def test_the_page_shows_every_setting_and_which_are_not_the_defaults(done):
    text = page(done, None, [])
    assert {path: (value, default) for path, value, default in changed_settings(done.facts["settings"])}[
        "model.width"
    ] == (32, 512)
    assert "<td>model.width</td><td>32</td><td>512</td>" in text
    assert (
        "<td>augmentation.flip</td><td>0.5</td>" in text
        and "<td>engine.optimizer.params.betas</td><td>[0.9, 0.999]</td>" in text
    )


def test_the_top_5_accuracy_of_five_classes_is_no_result(done, capsys):
    for num_classes in (5, 6):
        facts = json.loads(json.dumps(done.facts))
        facts["dataset"]["classes"] = facts["dataset"]["classes"][:num_classes]
        shown = "top-5" in page(replace(done, facts=facts), None, [])
        calibration = Calibration(seen=[1], correct=[1], confidence_sum=[1.0])
        result = SplitResult(some_confusion(num_classes), 9, 1.0, calibration)
        print_report({"split": "test", **describe(result, facts["dataset"]["classes"])}, all_classes=False)
        assert shown == ("Test top-5 accuracy: " in capsys.readouterr().out) == (num_classes > 5)


# --- names and captions of pictures ---------------------------------------------------------------------------------


ODD_NAMES = ["a_$x_{$", "$5 to $10", "猫", "a\x1b[31mb\nc", os.fsdecode(b"caf\xe9"), "|`*", "<b>", "", "é", "x" * 90]


def test_odd_names_are_drawn_as_they_are(done, analysis, tmp_path, capsys):
    facts = json.loads(json.dumps(done.facts))
    facts["dataset"]["classes"] = ODD_NAMES
    wrong = [replace(mistake, true=ODD_NAMES[0], predicted=ODD_NAMES[4]) for mistake in analysis.mistakes[:2]]
    pixels, maps, names = analysis.attention
    analysis = replace(analysis, mistakes=wrong, attention=(pixels, maps, ODD_NAMES[: len(names)]))
    run = replace(done, name="$\\frac{$ \udce9", facts=facts, folder=tmp_path)
    pictures = pictures_of(run, analysis)
    for picture in pictures:
        save(picture.figure, tmp_path / f"{picture.name}.png")
    texts = {text.get_text() for picture in pictures for text in picture.figure.findobj(Text)}
    assert "$5 to $10" in texts and "a\ufffd[31mb\ufffdc" in texts
    write_page(run, analysis, pictures).read_text()
    several([run, run], [run.name, "$x$"])
    assert capsys.readouterr().err.count("no installed font has the characters") <= 1


def test_a_character_without_font_is_reported_once_and_another_font_is_used(monkeypatch, capsys):
    monkeypatch.setattr(style, "_reported", set())
    monkeypatch.setattr(style, "_fonts_for", lambda missing: (["Some Font"], missing - {ord("猫")}))
    figure, ((axes,),) = style.make_figure(2, 2)
    axes.set_title("猫 \U0001f9ff")
    for _ in range(2):
        style.use_installed_fonts(figure)
    assert axes.title.get_fontfamily() == [style.FONT, "Some Font"]
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "characters '\U0001f9ff'; pictures show boxes" in error


def test_embedded_pictures_follow_dark_mode_and_have_no_background(done):
    svg = base64.b64decode(style.embed(curves.training(done)).split(",", 1)[1]).decode()
    assert "prefers-color-scheme: dark" in svg and "fill: #ffffff" not in svg
    assert style.INK in svg and f'[style*="stroke: {style.INK}"]{{stroke:' in svg


def test_the_caption_names_the_regularization_that_was_used(done):
    facts = json.loads(json.dumps(done.facts))
    model, augmentation = facts["settings"]["model"], facts["settings"]["augmentation"]
    model["dropout"], facts["settings"]["loss"]["label_smoothing"] = 0.0, 0.1
    caption = pictures_of(replace(done, facts=facts), None)[0].caption
    assert "augmented images, label smoothing, so" in caption and "dropout" not in caption
    facts["settings"]["loss"]["label_smoothing"], model["dropout"] = 0.0, 0.1
    for key in ("flip", "crop_padding"):
        augmentation[key] = 0
    assert "with dropout, so" in pictures_of(replace(done, facts=facts), None)[0].caption
