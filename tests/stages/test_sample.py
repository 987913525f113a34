"""`align sample` end to end on random models: what it writes, how it goes on, what it refuses."""

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from align.config.sections import DataSection
from align.data.rendering import training_rows
from align.errors import AlignError
from align.generation.scoring import RewardScorer
from align.models.loading import load_reward_model
from align.models.tokenizer import shipped_template
from align.registry import JUDGES, PAIR_RULES
from align.runs import Stopped, run_stage
from align.stages.sample import SampleConfig

PROMPTS = 10


def letters(row, completion: str) -> dict[str, float]:
    """A judge that likes many different characters; it depends on the text alone."""
    return {"score": len(set(completion)) / 10, "long": float(len(completion) > 5)}


@pytest.fixture(scope="module")
def policy(llama: Path, tmp_path_factory) -> Path:
    """A random model that ends its answers on many tokens, so that they have all lengths."""
    folder = tmp_path_factory.mktemp("policy") / "model"
    shutil.copytree(llama, folder)
    settings = {"eos_token_id": [1, *range(60, 90)], "pad_token_id": 5}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def reward_model(llama: Path, tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reward")
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    rows = [
        {"prompt": [{"role": "user", "content": f"Question {n}" + "?" * n}], "answer": str(n)}
        for n in range(PROMPTS)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(autouse=True, scope="module")
def _judge():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(JUDGES, "letters", letters)
        yield


@pytest.fixture(scope="module")
def recipe(policy: Path, data: Path):
    def make(folder: Path, **changes) -> SampleConfig:
        values = {
            "output_dir": str(folder),
            "model": {"model_name_or_path": str(policy)},
            "data": {"dataset_name": str(data)},
            "generation": {"num_generations": 4, "max_new_tokens": 12, "generation_batch_size": 8},
            "scorer": {"judge": "letters"},
            "save_prompts": 4,
        }
        return SampleConfig(**(values | changes))

    return make


@pytest.fixture
def config(recipe, tmp_path: Path):
    return lambda name="run", **changes: recipe(tmp_path / name, **changes)


@pytest.fixture(scope="module")
def plain(recipe, tmp_path_factory) -> Path:
    """The artifact of the plain recipe."""
    return run(recipe(tmp_path_factory.mktemp("plain") / "run"))


def run(config: SampleConfig) -> Path:
    return run_stage(config, quiet=True) / "artifact"


def rows_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_what_a_run_writes(plain, tokenizer):
    samples = pq.read_table(plain / "samples.parquet").to_pylist()
    assert [(s["prompt_index"], s["sample"]) for s in samples] == [
        (prompt, sample) for prompt in range(PROMPTS) for sample in range(4)
    ]
    assert {s["ended"] for s in samples} == {True, False}
    for sample in samples:
        assert (
            tokenizer.decode(sample["ids"], skip_special_tokens=True).strip()
            == sample["completion"]
        )
        assert sample["tokens"] == len(sample["ids"]) + sample["ended"]
        assert sample["ended"] == (sample["stop_id"] is not None)
        assert json.loads(sample["verdict"]) == letters({}, sample["completion"])
        assert sample["score"] == letters({}, sample["completion"])["score"]
        assert json.loads(sample["row"]) == {"answer": str(sample["prompt_index"])}
    report = json.loads((plain / "report.json").read_text())
    assert report["tokens"] == sum(s["tokens"] for s in samples)
    assert report["finished"] == sum(s["ended"] for s in samples) / len(samples)
    assert [point["n"] for point in report["growth"]] == [1, 2, 4]
    assert sum(report["score"]["histogram"]["counts"]) == len(samples)
    kept = [s for s in samples if s["kept"]]
    assert report["demonstrations"] == len(kept) == len(rows_of(plain / "sft.jsonl"))
    assert report["pairs"] == len(rows_of(plain / "pairs.jsonl"))


def test_the_best_finished_answer_becomes_the_demonstration(plain):
    samples = pq.read_table(plain / "samples.parquet").to_pylist()
    for prompt in range(PROMPTS):
        own = [s for s in samples if s["prompt_index"] == prompt]
        finished = [s for s in own if s["ended"] and s["completion"]]
        kept = [s for s in own if s["kept"]]
        assert len(kept) == min(1, len(finished))
        if kept:
            assert kept[0]["score"] == max(s["score"] for s in finished)
    demonstrations = rows_of(plain / "sft.jsonl")
    assert [set(row) for row in demonstrations] == [{"messages"}] * len(demonstrations)
    first = next(s for s in samples if s["kept"])
    assert demonstrations[0]["messages"] == [
        *json.loads(first["prompt"]),
        {"role": "assistant", "content": first["completion"]},
    ]


def test_pairs_hold_finished_answers_with_the_better_one_chosen(config):
    artifact = run(config(pairs={"pair_rule": "random", "pairs_per_prompt": 3, "min_gap": 0.1}))
    samples = pq.read_table(artifact / "samples.parquet").to_pylist()
    finished = {(s["prompt"], s["completion"]) for s in samples if s["ended"]}
    pairs = rows_of(artifact / "pairs.jsonl")
    assert pairs
    for pair in pairs:
        prompt = json.dumps(pair["prompt"], separators=(",", ":"))
        chosen, rejected = (pair[side][0]["content"] for side in ("chosen", "rejected"))
        assert {(prompt, chosen), (prompt, rejected)} <= finished
        gap = letters({}, chosen)["score"] - letters({}, rejected)["score"]
        assert pair["margin"] == pytest.approx(gap)
        assert gap >= 0.1 - 1e-12


def test_unfinished_answers_count_where_they_are_asked_for(config):
    pairing = {"only_finished": False, "keep_best": 3, "min_score": 0.4}
    samples = pq.read_table(run(config(pairs=pairing)) / "samples.parquet").to_pylist()
    kept = [s for s in samples if s["kept"]]
    assert any(not s["ended"] for s in kept)
    assert all(s["score"] >= 0.4 for s in kept)
    for prompt in range(PROMPTS):
        texts = [s["completion"] for s in kept if s["prompt_index"] == prompt]
        assert len(texts) == len(set(texts)) <= 3


def test_a_reward_model_scores_prompt_answer_and_end_of_turn(config, reward_model, tokenizer):
    artifact = run(config(scorer={"reward_model": str(reward_model)}))
    samples = pq.read_table(artifact / "samples.parquet").to_pylist()
    model, its_tokenizer = load_reward_model(str(reward_model))
    sequences = [
        tokenizer.apply_chat_template(
            json.loads(sample["prompt"]), add_generation_prompt=True, return_dict=False
        )
        + sample["ids"]
        + [tokenizer.convert_tokens_to_ids("<|eot_id|>")]
        for sample in samples
    ]
    expected = RewardScorer(model, its_tokenizer).score(sequences)
    assert [s["score"] for s in samples] == pytest.approx(expected, abs=1e-5)


def test_a_reward_model_with_another_template_reads_the_text(
    config, reward_model, tokenizer, tmp_path
):
    other = tmp_path / "other"
    shutil.copytree(reward_model, other)
    changed = tokenizer.chat_template.replace("<|eot_id|>", " <|eot_id|>")
    assert changed != tokenizer.chat_template
    (other / "chat_template.jinja").write_text(changed)
    artifact = run(config(scorer={"reward_model": str(other)}))
    samples = pq.read_table(artifact / "samples.parquet").to_pylist()
    model, its_tokenizer = load_reward_model(str(other))
    answered = [s for s in samples if s["completion"]]
    sequences = [
        its_tokenizer.apply_chat_template(
            [*json.loads(s["prompt"]), {"role": "assistant", "content": s["completion"]}],
            return_dict=False,
        )
        for s in answered
    ]
    expected = RewardScorer(model, its_tokenizer).score(sequences)
    assert [s["score"] for s in answered] == pytest.approx(expected, abs=1e-5)


def test_prompts_with_tools_are_sampled_scored_and_handed_on_with_them(
    config, reward_model, tokenizer, tmp_path
):
    """The reward model has a template of its own, so it reads prompt, functions and answer anew."""
    songs = {"type": "function", "function": {"name": "songs", "parameters": {"n": {"x": None}}}}
    call = {"type": "function", "function": {"name": "songs", "arguments": {"n": 3}}}
    chat = [
        {"role": "user", "content": "Songs?"},
        {"role": "assistant", "content": "", "tool_calls": [call], "weight": 0},
        {"role": "tool", "content": "a, b"},
    ]
    file, other = tmp_path / "tools.jsonl", tmp_path / "other"
    rows = [{"prompt": chat, "tools": [songs]}, {"prompt": chat[:1]}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(reward_model, other)
    changed = shipped_template("llama3.1").replace("These functions", "Functions")
    (other / "chat_template.jinja").write_text(changed)
    made = config(scorer={"reward_model": str(other)}, data={"dataset_name": str(file)})
    model = made.model.model_copy(update={"chat_template_path": "llama3.1"})
    artifact = run(made.model_copy(update={"model": model}))
    samples = pq.read_table(artifact / "samples.parquet").to_pylist()
    reward, its_tokenizer = load_reward_model(str(other))
    sequences = []
    for sample in samples:
        asked, tools = json.loads(sample["prompt"]), json.loads(sample["row"])["tools"]
        assert (asked, tools) == ((chat, [songs]) if tools else (chat[:1], None))
        turns = [*asked, {"role": "assistant", "content": sample["completion"]}]
        sequences.append(its_tokenizer.apply_chat_template(turns, tools=tools, return_dict=False))
    expected = RewardScorer(reward, its_tokenizer).score(sequences)
    pairs = zip(samples, expected, strict=True)
    assert all(s["score"] == pytest.approx(e, abs=1e-5) for s, e in pairs if s["completion"])
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = shipped_template("llama3.1")
    for name, kind in (("sft", "sft"), ("pairs", "dpo")):
        written = rows_of(artifact / f"{name}.jsonl")
        assert {json.dumps(row["tools"]) for row in written} <= {json.dumps([songs]), "null"}
        section = DataSection(dataset_name=str(artifact / f"{name}.jsonl"), max_length=None)
        made_rows = training_rows(section, tokenizer, kind).train
        prompts = {row["prompt_index"]: row for row in samples}
        assert len(made_rows) == len(written)
        assert len(prompts) == 2
        for row, source in zip(made_rows, written, strict=True):
            ids = row["input_ids"] if kind == "sft" else row["prompt_ids"]
            assert ('"name": "songs"' in tokenizer.decode(ids)) == bool(source["tools"])
            if kind == "sft":  # the call is context: the mark came along
                learned = tokenizer.decode([i for i in row["labels"] if i != -100])
                assert learned == source["messages"][-1]["content"] + "<|eot_id|>"


def stop_in_part_two(monkeypatch, error: BaseException) -> list[str]:
    """A judge like `letters` that fails once, in the second part."""
    calls: list[str] = []
    errors = [error]

    def judge(row, completion):
        calls.append(row["answer"])
        if row["answer"] == "5" and errors:
            raise errors.pop()
        return letters(row, completion)

    monkeypatch.setitem(JUDGES, "letters", judge)
    return calls


def test_a_stopped_run_goes_on_behind_the_last_complete_part(config, monkeypatch, tmp_path, plain):
    calls = stop_in_part_two(monkeypatch, KeyboardInterrupt())
    with pytest.raises(Stopped):
        run(config("stopped"))
    parts = tmp_path / "stopped.partial" / "parts"
    assert [path.name for path in parts.iterdir()] == ["part-00000.parquet"]
    (parts / ".part-00001.parquet.77.new").write_bytes(b"torn")
    calls.clear()
    artifact = run(config("stopped"))
    assert set(calls) == {str(n) for n in range(4, PROMPTS)}
    for name in ("samples.parquet", "sft.jsonl", "pairs.jsonl", "report.json"):
        assert (artifact / name).read_bytes() == (plain / name).read_bytes()
    assert not (tmp_path / "stopped" / "parts").exists()


def test_a_judge_that_fails_names_the_row_and_the_rest_is_kept(config, monkeypatch, tmp_path):
    calls = stop_in_part_two(monkeypatch, ZeroDivisionError("no words"))
    with pytest.raises(AlignError, match=r"row 6: the judge `letters` failed: ZeroDiv.*no words"):
        run(config())
    assert (tmp_path / "run.partial" / "parts" / "part-00000.parquet").exists()
    calls.clear()
    run(config())
    assert "0" not in calls


def test_parts_and_batches_do_not_change_what_is_sampled(config, plain):
    few = {"num_generations": 4, "max_new_tokens": 12, "generation_batch_size": 3}
    other = run(config("other", save_prompts=3, generation=few))
    for name in ("samples.parquet", "sft.jsonl", "pairs.jsonl"):
        assert _content(plain / name) == _content(other / name)


def _content(file: Path):
    return pq.read_table(file).to_pylist() if file.suffix == ".parquet" else rows_of(file)


def test_a_rule_of_a_world_gets_its_options(config, monkeypatch):
    def world(groups, *, seed: int, noise: float = 0.0):
        assert all(set(c) == {"text", "score", "ended"} for g in groups for c in g["completions"])
        return [
            {"prompt": g["row"]["prompt"], "chosen": "a", "rejected": "b", "kind": f"{noise}"}
            for g in groups
            if g["row"]["answer"] in "01"
        ]

    monkeypatch.setitem(PAIR_RULES, "world", world)
    pairing = {"pair_rule": "world", "rule_options": {"noise": 0.5}}
    artifact = run(config(pairs=pairing))
    report = json.loads((artifact / "report.json").read_text())
    assert report["pairs_by_kind"] == {"0.5": 2}
    assert report["mean_margin"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scorer": {}}, "neither is given"),
        ({"scorer": {"judge": "letters", "reward_model": "x"}}, "both are given"),
        ({"scorer": {"judge": "leters"}}, "did you mean `letters`"),
        ({"pairs": {"pair_rule": "best_wurst"}}, "did you mean `best_worst`"),
        ({"pairs": {"rule_options": {"noise": 1}}}, "pairs.rule_options.noise: the rule `best_wor"),
    ],
)
def test_what_is_refused_before_anything_is_loaded(config, changes, message, tmp_path, monkeypatch):
    monkeypatch.setattr("align.models.tokenizer.load_tokenizer", pytest.fail)
    with pytest.raises(AlignError, match=message):
        run(config(**changes))
    assert not list(tmp_path.iterdir())


def test_a_policy_where_a_reward_model_is_needed(config, policy, tmp_path):
    with pytest.raises(AlignError, match="a reward model is needed"):
        run(config(scorer={"reward_model": str(policy)}))
    assert not list(tmp_path.glob("run*"))


def test_the_reports_warnings_say_what_to_mend(config, capsys):
    silent = config(pairs={"min_score": 99.0, "min_gap": 99.0})
    report = json.loads((run_stage(silent) / "artifact" / "report.json").read_text())
    assert any("pairs.min_score" in line for line in report["warnings"])
    assert any("pairs.min_gap" in line for line in report["warnings"])
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "0 demonstrations kept" in shown.err
    assert "go beyond" not in shown.err
    assert "warning: no pair was found" in shown.err


def test_answers_beyond_the_models_positions_are_warned_of(config, capsys):
    generation = {"num_generations": 1, "max_new_tokens": 500, "temperature": 0.0}
    run_stage(
        config(generation=generation, data=config().data.model_copy(update={"max_samples": 1}))
    )
    assert "go beyond the 512 positions" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_sample_what_one_does(config, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    scorer = {"judge": "exact"}
    one = run(config("one", scorer=scorer))
    values = config("two", scorer=scorer).model_dump(mode="json", exclude_unset=True)
    recipe.write_text(json.dumps(values))
    command = [sys.executable, "-m", "align", "sample", "--recipe", str(recipe)]
    done = subprocess.run(
        [*command, "--num-processes", "2"], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    for name in ("samples.parquet", "sft.jsonl", "pairs.jsonl", "report.json"):
        assert _content_or_text(one / name) == _content_or_text(
            tmp_path / "two" / "artifact" / name
        )


def _content_or_text(file: Path):
    return file.read_text() if file.suffix != ".parquet" else _content(file)
