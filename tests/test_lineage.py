"""A fingerprint changes with what changes a result, and with nothing else."""

import os
from pathlib import Path
from typing import Any

import pytest

from align import lineage
from align.config.fields import config_class
from align.errors import AlignError
from align.lineage import (
    NOT_IN_RESULT,
    PUSH_KEYS,
    code_digest,
    differences,
    file_sha256,
    fingerprint,
    folder_digest,
    identify,
    leaves,
)
from align.stages import STAGES
from align.standing import check_inputs


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("base", "adapter", "tokenizer", "reward"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(name)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "chat.jinja").write_text("{{ messages }}")
    return tmp_path


def recipe(kind: str, place: Path) -> dict[str, Any]:
    """A recipe of a stage in which every key that names something does so."""
    base: dict[str, Any] = {"output_dir": str(place / "run")}
    data = {"dataset_name": str(place / "rows.jsonl")}
    model = {
        "model_name_or_path": str(place / "base"),
        "adapter_name_or_path": str(place / "adapter"),
        "tokenizer_name_or_path": str(place / "tokenizer"),
        "chat_template_path": str(place / "chat.jinja"),
    }
    if kind == "eval":
        models = {"one": str(place / "base"), "two": str(place / "adapter")}
        return base | {"data": data, "models": models, "reward_model": str(place / "reward")}
    if kind == "push":
        return base | {"run": str(place / "base"), "hub": {"repo_id": "me/model"}}
    if kind == "average":
        names = ("base", "adapter", "tokenizer", "reward")  # four folders that have a content
        return base | {"models": {name: str(place / name) for name in names}}
    base |= {"data": data, "model": model}
    if kind in ("sample", "ppo"):
        base["scorer"] = {"reward_model": str(place / "reward")}
    return base


def config(kind: str, place: Path, key: str | None = None, value: Any = None) -> Any:
    given = recipe(kind, place)
    if key is not None:
        *sections, last = key.split(".")
        inner = given
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = value
    return config_class(kind).model_validate(given)


OTHER: dict[str, Any] = {
    "model.adapter_mode": "continue",
    "data.dataset_train_split": "train[:50%]",
    "data.dataset_test_split": "train[:10%]",
    "model.dtype": "float16",
    "model.bnb_4bit_quant_type": "fp4",
    "data.format": "text",
    "data.truncation_mode": "drop",
    "data.test_split_size": 0.25,
    "data.columns": {"prompt": "question"},
    "lora.trainable_token_indices": [1],
    "generation.fold_adapter": True,
    "kl_estimator": "k3",
    "total_episodes": 8,
    "dual_clip": 3.0,
    "value_model": "policy",
    "value_init": "zero",
    "reward_normalization": "none",
    "alarms.stop_on": ["kl"],
    "scorer.reward_funcs": {"contains": 1.0},
    "lora.lora_modules_to_save": ["lm_head"],
    "trainer.lr_scheduler_kwargs": {"num_cycles": 2},
    "trainer.train_sampling_strategy": "sequential",
    "trainer.eval_strategy": "steps",
    "trainer.extra": {"neftune_noise_alpha": 5.0},
    "trainer.loss_type": "dft",
    "trainer.bf16": True,
    "trainer.keep_checkpoints": 2,
    "loss_weights": [2.0],
    "weights": {"base": 2.0},
    "method": "svd",
    "svd_rank": 3,
    "checkpoints": 2,
    "dtype": "float16",
    "generation.temperatures": [0.5],
    "generation.top_p": 0.5,
    "best_of": {"one": 4},
    "pairs.rule_options": {"x": 1},
    "confidence": 0.9,
    "reference": "one",
    "baseline": "two",
    "hub.merged_dtype": "float16",
}
"""Another value for keys where adding one or flipping makes none."""

ELSEWHERE = {"data.datasets", "scorer.judge", "data.dataset_name"}
"""Keys that have tests of their own below, or exclude one that the recipe gives."""


def another(key: str, value: Any) -> Any:
    if key in OTHER:
        return OTHER[key]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value / 2 if value else 0.125
    if isinstance(value, str):
        return f"{value}x"
    assert value is None, (key, value)
    return 3 if key.endswith(("max_samples", "_num_proc", "_steps", "max_length")) else "other"


@pytest.mark.parametrize("kind", STAGES)
def test_every_key_is_in_the_fingerprint_or_on_the_list(kind: str, place: Path) -> None:
    """Flip each key of each stage: the fingerprint changes unless the list says otherwise."""
    before = config(kind, place)
    expected = fingerprint(before)
    flipped = 0
    for key, value in leaves(before.model_dump(mode="json")):
        if key == "stage" or key in ELSEWHERE or key.startswith("models."):
            continue
        try:
            changed = config(kind, place, key, another(key, value))
        except ValueError:
            changed = config(kind, place, key, 0.5)
        flipped += 1
        alike = fingerprint(changed) == expected
        by_split = key == "launch.num_processes" and "trainer" not in type(before).model_fields
        after = kind != "push" and key.startswith(PUSH_KEYS)
        assert alike == (key in NOT_IN_RESULT or by_split or after), key
    assert flipped > {"push": 12, "average": 5}.get(kind, 15)


@pytest.mark.parametrize("kind", STAGES)
def test_content_counts_and_not_the_path(kind: str, place: Path) -> None:
    expected = fingerprint(config(kind, place))
    moved = place / "moved"
    moved.mkdir()
    names = ("base", "adapter", "tokenizer", "reward", "rows.jsonl", "chat.jinja")
    for name in names:
        (place / name).rename(moved / name)
    assert fingerprint(config(kind, moved, "output_dir", "elsewhere")) == expected
    seen = {facts["path"] for facts in identify(config(kind, moved)).inputs.values()}
    for name in names:
        if str(moved / name) not in seen:
            continue
        file = moved / name / "config.json" if (moved / name).is_dir() else moved / name
        before = file.read_text()
        file.write_text('{"prompt": "b"}\n')
        assert fingerprint(config(kind, moved)) != expected, name
        file.write_text(before)
    assert fingerprint(config(kind, moved)) == expected
    assert len(seen) >= (1 if kind == "push" else 4)


def test_files_that_change_no_answer_do_not_count(place: Path) -> None:
    expected = fingerprint(config("sft", place))
    (place / "base" / "README.md").write_text("words")
    (place / "base" / ".gitattributes").write_text("words")
    (place / "base" / "training_args.bin").write_text("words")
    assert fingerprint(config("sft", place)) == expected


def test_hub_ids_count_with_their_revision(place: Path) -> None:
    def hub(name: str, revision: str) -> str:
        model = {"model_name_or_path": name, "model_revision": revision}
        return fingerprint(config("sft", place, "model", model))

    found = {hub("org/a", "main"), hub("org/b", "main"), hub("org/a", "v2"), hub("org/a", "main")}
    assert len(found) == 3


def test_the_file_of_a_reward_function_counts_by_content_and_not_by_path(place: Path) -> None:
    def scored(*names: str) -> str:
        return fingerprint(config("ppo", place, "scorer.reward_funcs", dict.fromkeys(names, 1.0)))

    file = place / "mine.py"
    file.write_text("def f(completions, **_): return [1.0] * len(completions)")
    before = scored(f"{file}:f")
    assert scored(f"{file}:g") != before
    assert scored(f"{file}:f", "contains") != before
    assert before == scored(f"{file}:f")
    other = config("ppo", place, "scorer.reward_funcs", {f"{file}:f": 2.0})
    assert fingerprint(other) != before
    moved = place / "moved.py"
    file.rename(moved)
    assert scored(f"{moved}:f") == before
    facts = identify(config("ppo", place, "scorer.reward_funcs", {f"{moved}:f": 1.0})).inputs
    assert facts["scorer.reward_funcs[0]"]["kind"] == "code"
    moved.write_text(moved.read_text().replace("1.0", "2.0"))
    assert scored(f"{moved}:f") != before
    with pytest.raises(AlignError, match="no such file"):
        check_inputs(identify(config("ppo", place, "scorer.reward_funcs", {f"{file}:f": 1.0})))


def test_a_mixture_counts_by_content_and_weight(place: Path) -> None:
    (place / "more.jsonl").write_text('{"prompt": "more"}\n')

    def mixture(*weights: float) -> str:
        paths = [str(place / "rows.jsonl"), str(place / "more.jsonl")]
        entries = [{"path": p, "weight": w} for p, w in zip(paths, weights, strict=True)]
        return fingerprint(config("sft", place, "data", {"datasets": entries}))

    before = mixture(1.0, 1.0)
    assert mixture(1.0, 2.0) != before
    (place / "more.jsonl").write_text('{"prompt": "other"}\n')
    assert mixture(1.0, 1.0) != before


def test_rows_that_are_not_there_are_an_answer(place: Path) -> None:
    (place / "rows.jsonl").unlink()
    with pytest.raises(AlignError, match=r"rows\.jsonl"):
        fingerprint(config("sft", place))


def test_how_a_step_is_split_does_not_count_but_its_rows_do(place: Path) -> None:
    def split(rows: int, accumulate: int, processes: int, strategy: str = "random") -> str:
        trainer = {
            "per_device_train_batch_size": rows,
            "gradient_accumulation_steps": accumulate,
            "train_sampling_strategy": strategy,
        }
        given = recipe("sft", place) | {"trainer": trainer, "launch": {"num_processes": processes}}
        return fingerprint(config_class("sft").model_validate(given))

    assert split(8, 1, 1) == split(2, 4, 1) == split(2, 2, 2) != split(4, 1, 1)
    grouped = "group_by_length"
    assert split(8, 1, 1, grouped) == split(4, 2, 1, grouped) != split(4, 1, 2, grouped)


def test_the_code_of_a_stage_is_that_of_its_rooms(tmp_path: Path, monkeypatch) -> None:
    root = tmp_path / "align"
    for file in ("data/a.py", "training/b.py", "generation/c.py", "training/callbacks.py"):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text("x = 1")
    monkeypatch.setattr(lineage, "__file__", str(root / "lineage.py"))

    def digests() -> list[str]:
        code_digest.cache_clear()
        return [code_digest("sft"), code_digest("sample"), code_digest()]

    try:
        before = digests()
        (root / "training/callbacks.py").write_text("x = 2")
        assert digests() == before
        (root / "training/b.py").write_text("x = 2")
        after = digests()
        assert [a == b for a, b in zip(before, after, strict=True)] == [False, True, False]
    finally:
        code_digest.cache_clear()


def test_differences_are_said_by_key() -> None:
    old = {"recipe": {"a": 1, "b": 2}, "inputs": {"data[0]": "x", "m": "y"}, "code": "1"}
    new = {"recipe": {"a": 1, "b": 3}, "inputs": {"data[0]": "z", "m": "y"}, "code": "2"}
    assert differences(old, new) == [
        "b: 2 -> 3",
        "the rows have other content",
        "align's code for this stage",
    ]
    assert differences(old, old) == []


def test_a_hash_is_remembered_until_the_file_changes(place: Path, monkeypatch) -> None:
    monkeypatch.setattr(lineage, "CACHED_FROM", 1)
    reads = []
    original = lineage.read_sha256
    monkeypatch.setattr(lineage, "read_sha256", lambda path: reads.append(path) or original(path))
    file = place / "big.safetensors"
    file.write_text("old content")
    first = file_sha256(file)
    file_sha256(file)
    assert len(reads) == 2, "a file that was written just now is read again"
    monkeypatch.setattr(lineage.time, "time_ns", lambda: file.stat().st_ctime_ns + 10**11)
    assert file_sha256(file) == first
    assert file_sha256(file) == first
    assert len(reads) == 3
    stamp = file.stat()
    file.write_text("new content")
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert file_sha256(file) != first, "same size and mtime, other content"


def test_a_broken_cache_costs_time_and_nothing_else(place: Path, monkeypatch) -> None:
    monkeypatch.setattr(lineage, "CACHED_FROM", 1)
    (place / "cache" / "align").mkdir(parents=True)
    (place / "cache" / "align" / "hashes.json").write_text("no json")
    file = place / "big"
    file.write_text("content")
    assert len(file_sha256(file)) == 64
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    assert len(file_sha256(file)) == 64


def test_a_folder_digest_sees_names_and_contents(place: Path) -> None:
    folder = place / "base"
    before = folder_digest(folder)
    (folder / "config.json").rename(folder / "other.json")
    assert folder_digest(folder) != before
    (folder / "other.json").rename(folder / "config.json")
    assert folder_digest(folder) == before
    assert folder_digest(folder, "*.safetensors") == folder_digest(
        place / "adapter", "*.safetensors"
    )
