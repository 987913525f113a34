"""The files behind a recipe's rows, by content."""

import hashlib
from pathlib import Path

import pytest

from align.config.sections import DataSection, DatasetEntry
from align.data.fingerprint import describe_sources, entries
from align.errors import AlignError


def test_a_file_is_described_by_its_content(write):
    path = write([{"a": 1}, {"a": 2}])
    (info,) = describe_sources(DataSection(dataset_name=path))
    assert info.sha256 == hashlib.sha256(Path(path).read_bytes()).hexdigest()
    assert (info.path, info.rows) == (path, 2)
    write([{"a": 1}, {"a": 3}])
    assert describe_sources(DataSection(dataset_name=path))[0].sha256 != info.sha256


def test_every_split_that_is_read_is_described_once(write, tmp_path):
    write([{"a": 1}], "train.jsonl")
    write([{"a": 1}], "test.jsonl")
    data = DataSection(
        dataset_name=str(tmp_path),
        dataset_train_split="train[:50%]+train[50%:]",
        dataset_test_split="test",
    )
    assert [info.split for info in describe_sources(data)] == ["train", "test"]


def test_what_a_card_says_of_reading_counts_and_its_words_do_not(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"q": "a"}\n')
    data = DataSection(dataset_name=str(tmp_path))

    def described(description: str, mapping: str) -> list:
        (tmp_path / "card.yaml").write_text(
            f"name: own\ndescription: {description}\nlicense: mit\nsource: me\n"
            f"splits: {{train: {{file: rows.jsonl}}}}\nmapping: {mapping}\n"
        )
        return describe_sources(data)

    first = described("some words", "{prompt: q}")
    assert [info.path.rpartition("/")[2] for info in first] == ["rows.jsonl", "card.yaml"]
    assert described("other words", "{prompt: q}") == first
    assert described("some words", "{text: q}") != first


def test_a_hub_data_set_is_named_and_not_fetched():
    (info,) = describe_sources(DataSection(dataset_name="org/name", dataset_config="main"))
    assert (info.path, info.sha256) == ("org/name", None)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "no data set is given"),
        ({"dataset_name": "a", "datasets": [{"path": "b"}]}, "both given"),
        ({"datasets": []}, "is empty"),
        (
            {"datasets": [{"path": "a", "weight": 1}, {"path": "b"}]},
            "b has no weight, and other sources have one",
        ),
    ],
)
def test_unclear_sources_are_refused(keys, message):
    with pytest.raises(AlignError, match=message):
        entries(DataSection(**keys))


def test_another_split_is_read_from_the_same_sources():
    data = DataSection(datasets=[{"path": "a", "split": "train[:5]"}, {"path": "b"}])
    assert [entry.split for entry in entries(data)] == ["train[:5]", "train"]
    assert entries(data, "test") == [
        DatasetEntry(path="a", split="test"),
        DatasetEntry(path="b", split="test"),
    ]
