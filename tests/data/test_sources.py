"""Slices, folders, mixtures and the Hub."""

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from align.config.sections import DataSection
from align.data import sources
from align.data.sources import load_sources, mixture
from align.errors import AlignError


def rows(count: int) -> list[dict]:
    return [{"a": number} for number in range(count)]


def values(source) -> list[int]:
    return source.dataset["a"][:]


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", range(10)),
        ("train[:30%]", range(3)),
        ("train[30%:]", range(3, 10)),
        ("train[:25%]", range(2)),
        ("train[:12.5%]", range(1)),
        ("train[2:5]", range(2, 5)),
        ("train[-3:]", range(7, 10)),
        ("train[:-8]", range(2)),
        ("train[8:50]", range(8, 10)),
        (" train[ 1 : 3 ] ", range(1, 3)),
        ("train[:2]+train[8:]", [0, 1, 8, 9]),
    ],
)
def test_splits_are_sliced(write, split, expected):
    (source,) = load_sources(DataSection(dataset_name=write(rows(10)), dataset_train_split=split))
    assert values(source) == list(expected)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("train[1]", r"`train\[1\]` is no split"),
        ("train[a:b]", "is no split"),
        ("train[5:5]", "takes no row"),
        ("train[:0%]", "takes no row"),
        ("test", "has no split `test`"),
    ],
)
def test_bad_slices_are_named(write, split, message):
    with pytest.raises(AlignError, match=message):
        load_sources(DataSection(dataset_name=write(rows(10)), dataset_train_split=split))


def test_rows_know_their_file_and_number(write, tmp_path):
    write(rows(3), "all/train-0.jsonl")
    write(rows(4), "all/train-1.jsonl")
    folder = str(tmp_path / "all")
    (source,) = load_sources(DataSection(dataset_name=folder, dataset_train_split="train[2:]"))
    assert values(source) == [2, 0, 1, 2, 3]
    assert source.where(0).endswith("train-0.jsonl row 3")
    assert source.where(1).endswith("train-1.jsonl row 1")
    assert source.take([4, 0]).where(0).endswith("train-1.jsonl row 4")
    assert [info.rows for info in source.infos] == [3, 4]


def test_parts_of_several_splits_know_their_rows(write, tmp_path):
    write(rows(3), "all/a.jsonl")
    write(rows(4), "all/b.jsonl")
    data = DataSection(dataset_name=str(tmp_path / "all"), dataset_train_split="a[1:]+b[:1]")
    (source,) = load_sources(data)
    assert values(source) == [1, 2, 0]
    assert source.where(1).endswith("a.jsonl row 3")
    assert source.where(2).endswith("b.jsonl row 1")


@pytest.mark.parametrize(
    "values", [(1, "x"), ("x", 1), ({"b": 1}, {"b": "x", "c": 1}), ([1], ["x"])]
)
def test_shards_with_other_types_are_refused(write, tmp_path, values):
    for number, value in enumerate(values):
        write([{"a": value}], f"all/train-{number}.jsonl")
    with pytest.raises(AlignError, match="columns of different types"):
        load_sources(DataSection(dataset_name=str(tmp_path / "all")))


def test_shards_whose_objects_have_other_keys_are_one_source(write, tmp_path):
    parts = [
        {"a": [{"b": 1}]},
        {"a": [{"c": {"d": "x"}}]},
        {"a": [{"c": {"e": None}}]},
        {"a": None},
    ]
    for number, row in enumerate(parts):
        write([row], f"all/train-{number}.jsonl")
    (source,) = load_sources(DataSection(dataset_name=str(tmp_path / "all")))
    assert [row["a"] for row in source.dataset] == [
        [{"b": 1, "c": None}],
        [{"b": None, "c": {"d": "x", "e": None}}],
        [{"b": None, "c": {"d": None, "e": None}}],
        None,
    ]


def test_a_changed_file_is_read_again(write):
    """Same length and maybe the same date: the cache of load_dataset would not see it."""
    data = DataSection(dataset_name=write(rows(5)))
    assert values(load_sources(data)[0]) == [0, 1, 2, 3, 4]
    write([{"a": 9 - number} for number in range(5)])
    assert values(load_sources(data)[0]) == [9, 8, 7, 6, 5]


def test_the_columns_of_a_recipe_replace_those_of_a_card():
    (source,) = load_sources(DataSection(dataset_name="gsm8k-sample"))
    assert source.columns == {"instruction": "question", "output": "answer"}
    data = DataSection(dataset_name="gsm8k-sample", columns={"prompt": "question"})
    assert load_sources(data)[0].columns == {"prompt": "question"}


def test_the_hub_is_asked_for_the_split_and_sliced_here(monkeypatch):
    asked = []

    def load_dataset(*arguments, **named):
        asked.append((arguments, named))
        made = Dataset.from_list(rows(10))
        commit = "0123456789abcdef0123456789abcdef01234567"
        made.info.download_checksums = {f"hf://datasets/org/name@{commit}/train.parquet": {}}
        return made

    monkeypatch.setattr(sources, "load_dataset", load_dataset)
    data = DataSection(
        dataset_name="org/name", dataset_config="main", dataset_train_split="train_sft[:20%]"
    )
    (source,) = load_sources(data)
    assert asked == [(("org/name", "main"), {"split": "train_sft"})]
    assert values(source) == [0, 1]
    assert source.infos[0].revision == "0123456789abcdef0123456789abcdef01234567"
    assert source.where(1) == "org/name (train_sft) row 2"


def test_what_the_hub_refuses_is_one_sentence(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("no network\nwith a long story")

    monkeypatch.setattr(sources, "load_dataset", load_dataset)
    with pytest.raises(AlignError, match="cannot be loaded from the Hub: no network\n") as caught:
        load_sources(DataSection(dataset_name="org/name"))
    assert "check the id" in caught.value.problems[0].hint


def test_a_mixture_has_its_shares_and_takes_no_row_twice():
    first, second = mixture([100, 40], [3, 1], None)
    assert (len(first), len(second)) == (100, 33)
    first, second = mixture([100, 10], [1, 1], None)
    assert (len(first), len(second)) == (10, 10)
    assert [len(part) for part in mixture([100, 100], [0.3, 0.1], None)] == [100, 33]
    assert [len(part) for part in mixture([90, 10], None, 50)] == [45, 5]
    assert list(mixture([5], [2], 3)[0]) == [0, 1, 2]


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=2, max_size=4),
    shares=st.lists(st.integers(1, 9), min_size=4, max_size=4),
    most=st.none() | st.integers(10, 100),
)
def test_mixtures_in_general(sizes, shares, most):
    weights = [float(share) for share in shares[: len(sizes)]]
    parts = mixture(sizes, weights, most)
    for part, size in zip(parts, sizes, strict=True):
        assert len(set(part)) == len(part) >= 1
        assert min(part) >= 0
        assert max(part) < size
        assert list(part) == sorted(part)
    again = mixture(sizes, weights, most)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))
    if most is not None:
        assert sum(map(len, parts)) <= most + len(sizes)
    # No source could give one more row without some source giving more than its share.
    if most is None:
        scale = min(size / weight for size, weight in zip(sizes, weights, strict=True))
        assert [len(part) for part in parts] == [
            max(int(scale * weight + 1e-9), 1) for weight in weights
        ]
