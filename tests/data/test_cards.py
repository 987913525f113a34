"""What a name in a recipe means, and the cards that ship."""

import json
import subprocess
import sys

import pytest

from align.data.cards import CARD, locate, read_card
from align.errors import AlignError
from align.resources import shipped

CARDS = sorted(path.parent.name for path in shipped("datasets").glob(f"*/{CARD}"))


def test_the_well_known_sets_have_cards():
    assert {"tiny-world", "gsm8k-sample", "alpaca", "hh-rlhf"} <= set(CARDS)


@pytest.mark.parametrize("name", CARDS)
def test_shipped_cards_load_and_their_rows_are_there(name):
    card = read_card(shipped("datasets") / name / CARD)
    assert card.name == name
    for split, given in card.splits.items():
        location = locate(name, split)
        if given is None:
            assert location.hub == card.hub
            assert not location.files
        else:
            (file,) = location.files
            lines = file.read_text(encoding="utf-8").splitlines()
            assert len(lines) == given.rows
            assert all(json.loads(line) for line in lines[:3])


def test_the_readme_lists_every_card():
    text = (shipped("datasets") / "README.md").read_text(encoding="utf-8")
    assert [name for name in CARDS if f"| `{name}` |" not in text] == []


def test_a_card_of_ones_own_works_in_the_same_way(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"q": "a"}\n')
    (tmp_path / CARD).write_text(
        "name: own\ndescription: d\nlicense: mit\nsource: me\n"
        "splits: {train: {file: rows.jsonl, format: prompts}}\nmapping: {prompt: q}\n"
    )
    location = locate(str(tmp_path), "train")
    assert location.files == (tmp_path / "rows.jsonl",)
    assert location.format == "prompts"
    assert location.mapping == {"prompt": "q"}


CARD_HEAD = "name: x\ndescription: d\nlicense: mit\nsource: me\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\n", "description: Field required"),
        (CARD_HEAD + "splits: {train: {file: a.jsonl}}\nlicence: mit\n", "licence: Extra inputs"),
        (CARD_HEAD + "splits: {train: }\n", "names no file, and the card has no `hub`"),
        (CARD_HEAD + "splits: {}\n", "splits"),
        (CARD_HEAD + "splits: {train: {file: a.jsonl}}\n", "names a.jsonl, which is not there"),
        ("name: [x\n", "cannot be read"),
    ],
)
def test_a_broken_card_is_named(tmp_path, text, message):
    (tmp_path / CARD).write_text(text)
    with pytest.raises(AlignError, match=message):
        locate(str(tmp_path), "train")


def test_a_folder_has_a_split_for_each_file_name(tmp_path):
    for name in ("train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "test.jsonl"):
        (tmp_path / name).write_text("{}\n")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "val.csv").write_text("a\n1\n")
    (tmp_path / "notes.txt").write_text("no rows")
    names = [file.name for file in locate(str(tmp_path), "train").files]
    assert names == ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"]
    assert [file.name for file in locate(str(tmp_path), "val").files] == ["val.csv"]
    with pytest.raises(AlignError, match="has no split `tests`") as caught:
        locate(str(tmp_path), "tests")
    assert "`test`, `train`, `val`" in caught.value.problems[0].hint
    assert "did you mean `test`?" in caught.value.problems[0].hint


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("nowhere.jsonl", "train", "no such file or folder"),
        ("./nowhere", "train", "no such file or folder"),
        ("a/b/c", "train", "no such file or folder"),
        ("rows.txt", "train", "is no .jsonl, .json, .csv, .parquet, .arrow file"),
        ("rows.jsonl", "test", "is a single file and has no split `test`"),
        ("empty", "train", "holds no .jsonl"),
        ("tiny-world", "nowhere", "has no split `nowhere`"),
    ],
)
def test_what_is_not_there_is_named(tmp_path, monkeypatch, name, split, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.txt").write_text("a")
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "empty").mkdir()
    with pytest.raises(AlignError, match=message):
        locate(name, split)


def test_what_is_nowhere_here_is_taken_for_a_hub_id():
    location = locate("org/name", "train_sft", "main")
    assert (location.hub, location.split, location.config) == ("org/name", "train_sft", "main")


def test_cards_and_fingerprints_are_light():
    code = (
        "import sys, align.data.fingerprint\n"
        "heavy = {'torch', 'transformers', 'trl', 'peft', 'datasets', 'accelerate'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
