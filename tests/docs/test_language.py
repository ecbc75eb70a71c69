"""One term for one thing: words that no text of this project uses, and what to write in their place.

It reads every text file of the project: documents, help, messages, comments, docstrings, presets, experiments.
"""

from __future__ import annotations

import re

import pytest
from project_files import project_files

from common.paths import PROJECT

# Pattern (whole words, any case) -> what to write.
FORBIDDEN = {
    r"held[- ]out part": "validation split",
    r"baseline of old": "legacy baseline",
    r"what is seen of it": "logging",
    r"drawer of \w+": "registry",
    r"the person|of a person": "the user",
    r"prove nothing|proves nothing": "preliminary (n seeds)",
    r"mend|mends|mended|mending": "fix",
    r"reckoned": "estimated",
    r"told apart": "distinguished",
    r"lest": "so that ... not",
    r"anew": "again",
    r"thrice": "three times",
    r"handed? over|handed on": "export, save or pass",
    r"in the making": "in flight",
    r"as good as any other": "equally valid",
    r"watching cost": "logging overhead",
    r"stairs": "step decay",
    r"images a second": "images/s",
    r"the arms?|an arm|every arm|each arm|two arms|all arms": "variant",
    r"optimis\w+": "optimiz...",
    r"normalis\w+": "normaliz...",
    r"initialis\w+": "initializ...",
    r"regularis\w+": "regulariz...",
    r"colours?|coloured": "color",
    r"centres?|centred": "center",
    r"neighbours?": "neighbor",
    r"behaviou?rs?(?<!behavior)(?<!behaviors)": "behavior",
    r"learnt": "learned",
    r"grey|greyscale": "gray",
    r"decentralis\w+": "decentraliz...",
    r"speak for|speaks for": "indicate",
    r"go(es)? on where": "resumes where",
    r"lie[sd]? with whom": "belongs to",
}
ANY_FORBIDDEN = re.compile("|".join(FORBIDDEN), re.IGNORECASE)
TEXTS = (".py", ".md", ".toml", ".sh", ".sbatch", ".txt", ".cff", "")
# Kept reports quote the words of their day; the fixture and this list name what is forbidden.
EXEMPT_FILES = ("results/", "tests/fixtures/", "tests/docs/test_language.py", "tests/docs/test_readme.py")
# Names on the disk or of other libraries, which stay as they are.
EXEMPT_WORDS = re.compile(
    r"utilisation(\.jsonl|\.png)?|utilisation_\w+|[\"'`]utilisation[\"'`]|\.neighbours\b|\bneighbours\.|\"neighbours\"|self\.neighbours"
    r"|\"optimiser\": |normalise = normalize|\[\[arms\]\]|[\"'`]arms?[\"'`]|report\[\"arms\"\]|\bgrey_|_grey\b"
)


def text_files() -> list[str]:
    """Paths of the project's text files, relative to it."""
    return [name for name in project_files(*TEXTS) if name == "results/LOG.md" or not name.startswith(EXEMPT_FILES)]


def offenses(text: str) -> list[tuple[int, str, str]]:
    """Line, word and what to write in its place, for every forbidden word of a text."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if not ANY_FORBIDDEN.search(line):
            continue
        line = EXEMPT_WORDS.sub("", line)
        for pattern, instead in FORBIDDEN.items():
            found += [
                (number, match[0], instead) for match in re.finditer(rf"(?<![\w-])(?:{pattern})(?![\w-])", line, re.I)
            ]
    return found


def test_no_text_uses_a_word_of_its_own():
    found = []
    for name in text_files():
        for number, word, instead in offenses((PROJECT / name).read_text(encoding="utf-8")):
            found.append(f"{name}:{number}: '{word}' -> {instead}")
    assert not found, f"{len(found)} places:\n" + "\n".join(found[:60])


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("accuracy on the held-out part", ["held-out part"]),
        ("an optimiser and its colours", ["optimiser", "colours"]),
        ("utilisation.jsonl holds what the GPU did", []),
        ("the suggested amendment is a commendable one", []),
        ("[[arms]]", []),
    ],
)
def test_whole_words_are_found_and_names_on_the_disk_are_left_alone(line, expected):
    assert [word for _, word, _ in offenses(line)] == expected
