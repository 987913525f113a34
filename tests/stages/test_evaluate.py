"""`align eval` end to end on random models: scores, intervals, divergence, best-of-K, refusals."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from align.config.sections import LoraSection
from align.errors import AlignError
from align.evaluation.statistics import mean_interval, paired_difference
from align.generation.scoring import RewardScorer
from align.models.adapters import lora_config, save_adapter
from align.models.loading import load_any_policy, load_reward_model
from align.registry import JUDGES
from align.runs import Stopped, run_stage
from align.stages.evaluate import EvalConfig

PROMPTS = 12
EOT = 4


def letters(row, completion: str) -> dict[str, float]:
    """A judge of the text alone: graded score, and two parts that are 0 or 1."""
    many = float(len(set(completion)) > 4)
    return {"score": len(set(completion)) / 20, "correct": many, "refused": 1 - many}


@pytest.fixture(scope="module")
def first(llama: Path, tmp_path_factory) -> Path:
    return _with_many_ends(llama, tmp_path_factory)


@pytest.fixture(scope="module")
def second(make_llama, tmp_path_factory) -> Path:
    return _with_many_ends(make_llama(7), tmp_path_factory)


def _with_many_ends(model: Path, tmp_path_factory) -> Path:
    """A copy that ends its answers on many tokens, so that they have all lengths."""
    folder = tmp_path_factory.mktemp("policy") / "model"
    shutil.copytree(model, folder)
    settings = {"eos_token_id": [1, *range(60, 90)], "pad_token_id": 5}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def adapter(first: Path, tokenizer, tmp_path_factory) -> Path:
    from peft import get_peft_model

    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_pretrained(first, dtype=torch.float32)
    model = get_peft_model(base, lora_config(LoraSection(lora_r=4)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    save_adapter(model, folder, base=str(first), revision="main")
    tokenizer.save_pretrained(folder)
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
        {
            "prompt": [{"role": "user", "content": f"Question {n}" + "?" * n}],
            "task": ("fact", "math", "unsafe")[n % 3],
        }
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
def recipe(first: Path, second: Path, data: Path):
    def make(folder: Path, **changes) -> EvalConfig:
        values = {
            "output_dir": str(folder),
            "models": {"one": str(first), "two": str(second)},
            "data": {"dataset_name": str(data)},
            "generation": {"temperatures": [1.0, 0.0], "max_new_tokens": 10},
            "judge": "letters",
        }
        return EvalConfig(**(values | changes))

    return make


@pytest.fixture
def config(recipe, tmp_path: Path):
    return lambda name="run", **changes: recipe(tmp_path / name, **changes)


@pytest.fixture(scope="module")
def plain(recipe, tmp_path_factory) -> tuple[dict, list[dict]]:
    """Results and answers of the plain recipe with `two` as the baseline."""
    return run(recipe(tmp_path_factory.mktemp("plain") / "run", baseline="two"))


def run(config: EvalConfig) -> tuple[dict, list[dict]]:
    artifact = run_stage(config, quiet=True) / "artifact"
    answers = pq.read_table(artifact / "answers.parquet").to_pylist()
    return json.loads((artifact / "results.json").read_text()), answers


def of(answers: list[dict], row: dict) -> list[dict]:
    keys = ("model", "temperature", "best_of")
    return [a for a in answers if all(a[key] == row[key] for key in keys)]


def test_scores_are_those_of_the_judge_with_zeros_for_unfinished_answers(plain):
    results, answers = plain
    assert [(row["label"], row["temperature"]) for row in results["rows"]] == [
        ("one", 1.0), ("one", 0.0), ("two", 1.0), ("two", 0.0),
    ]  # fmt: skip
    assert {answer["ended"] for answer in answers} == {True, False}
    for row in results["rows"]:
        own = of(answers, row)
        assert [answer["prompt_index"] for answer in own] == list(range(PROMPTS))
        for part in ("score", "correct", "refused"):
            values = [letters({}, a["answer"])[part] if a["ended"] else 0.0 for a in own]
            assert row["scores"][part] == mean_interval(values, 0.95, 42).as_dict()
        assert [a["score"] for a in own] == [
            letters({}, a["answer"])["score"] if a["ended"] else 0.0 for a in own
        ]
        assert row["tokens_in_all"] == sum(a["tokens"] for a in own)
        assert row["ended"]["mean"] == np.mean([a["ended"] for a in own])
        assert row["kl"] is row["reward"] is None


def test_tasks_and_refusals(plain):
    results, answers = plain
    assert results["tasks"] == {"fact": 4, "math": 4, "unsafe": 4}
    for row in results["rows"]:
        own = of(answers, row)
        verdicts = [letters({}, a["answer"]) if a["ended"] else {} for a in own]
        for place, task in enumerate(("fact", "math", "unsafe")):
            inside = [v.get("correct", 0.0) for v in verdicts[place::3]]
            assert row["tasks"][task]["scores"]["correct"]["mean"] == np.mean(inside)
        refused = [v.get("refused", 0.0) for v in verdicts]
        assert row["refusals"]["unsafe"]["mean"] == np.mean(refused[2::3])
        safe = [value for at, value in enumerate(refused) if at % 3 != 2]
        assert row["refusals"]["safe"]["mean"] == pytest.approx(np.mean(safe))


def test_differences_to_the_baseline_are_paired_at_the_same_temperature(plain):
    results, answers = plain
    rows = {(row["label"], row["temperature"]): row for row in results["rows"]}
    for temperature in (1.0, 0.0):
        ours, theirs = rows["one", temperature], rows["two", temperature]
        assert theirs["difference"] is None
        a, b = ([x["score"] for x in of(answers, row)] for row in (ours, theirs))
        found = ours["difference"]
        assert found["to"] == "two"
        assert found["scores"]["score"] == paired_difference(a, b, 0.95, 42).as_dict()
        task = paired_difference(a[1::3], b[1::3], 0.95, 42).as_dict()
        assert found["tasks"]["math"]["score"] == task
        assert set(found["tasks"]["math"]) == {"score", "correct"}


@pytest.mark.parametrize("reference", ["one", "tuned"])
def test_divergence_on_a_models_own_answers(config, first, adapter, reference):
    models = {"one": str(first), "tuned": str(adapter)}
    results, answers = run(config(models=models, reference=reference))
    other = "tuned" if reference == "one" else "one"
    rows = {row["label"]: row for row in results["rows"] if row["temperature"] == 1}
    assert rows[reference]["kl"]["k1"]["mean"] == 0
    sums = {}
    for name, path in models.items():
        model, tokenizer = load_any_policy(path)
        sums[name] = []
        for answer in of(answers, rows[other]):
            prompt = tokenizer.apply_chat_template(
                json.loads(answer["prompt"]), add_generation_prompt=True, return_dict=False
            )
            drawn = answer["ids"] + ([answer["stop_id"]] if answer["ended"] else [])
            with torch.no_grad():
                logits = model(torch.tensor([prompt + drawn])).logits[0].log_softmax(-1)
            places = range(len(prompt) - 1, len(prompt) + len(drawn) - 1)
            sums[name].append(float(logits[places, drawn].sum()))
    ratios = np.array(sums[other]) - np.array(sums[reference])
    found = rows[other]["kl"]
    assert found["k1"]["n"] == found["k3"]["n"] == PROMPTS
    assert found["k1"]["mean"] == pytest.approx(ratios.mean(), abs=1e-4)
    assert found["k3"]["low"] > 0
    # Every model's greedy row says the same: the divergence is the model's.
    greedy = next(r for r in results["rows"] if r["label"] == other and r["temperature"] == 0)
    assert greedy["kl"] == found


def test_both_estimators_reach_the_exact_value(config, first, second, tmp_path):
    """With one token per answer the divergence has a closed form."""
    many = tmp_path / "many.jsonl"
    question = [{"role": "user", "content": "Question?"}]
    many.write_text((json.dumps({"prompt": question}) + "\n") * 1500)
    results, _ = run(
        config(
            data={"dataset_name": str(many)},
            generation={"temperatures": [0.0], "max_new_tokens": 1, "generation_batch_size": 500},
            reference="two",
        )
    )
    (one, tokenizer), (two, _) = (load_any_policy(str(path)) for path in (first, second))
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
    with torch.no_grad():
        p, q = (m(torch.tensor([prompt])).logits[0, -1].log_softmax(-1) for m in (one, two))
    exact = float((p.exp() * (p - q)).sum())
    for found in results["rows"][0]["kl"].values():
        half = (found["high"] - found["low"]) / 2
        assert abs(found["mean"] - exact) < 2 * half  # four deviations
        assert half < exact / 3


def test_best_of_k_is_chosen_by_the_reward_model(config, reward_model, plain):
    results, answers = run(
        config(reward_model=str(reward_model), best_of={"two": 3}, baseline="two")
    )
    row = results["rows"][-1]
    assert (row["label"], row["best_of"], row["temperature"]) == ("two best-of-3", 3, 1.0)
    once = next(r for r in results["rows"] if r["label"] == "two" and r["temperature"] == 1)
    best, single = of(answers, row), of(answers, once)
    assert row["difference"]["to"] == "two"
    assert row["reward"]["mean"] > once["reward"]["mean"]
    for chosen, one in zip(best, single, strict=True):
        assert chosen["ended"] >= one["ended"]
        if chosen["ended"] == one["ended"]:
            assert chosen["reward"] >= one["reward"]
    # The first of the K samples is the answer at temperature 1, drawn once for both rows.
    alone = next(r for r in plain[0]["rows"] if r["label"] == "two" and r["temperature"] == 1)
    assert alone["scores"] == once["scores"]


def test_rewards_are_those_of_the_reward_model(config, reward_model, tokenizer):
    results, answers = run(config(reward_model=str(reward_model), judge=None))
    model, its_tokenizer = load_reward_model(str(reward_model))
    sequences = [
        tokenizer.apply_chat_template(
            json.loads(a["prompt"]), add_generation_prompt=True, return_dict=False
        )
        + a["ids"]
        + [EOT]
        for a in answers
    ]
    expected = RewardScorer(model, its_tokenizer).score(sequences)
    assert [a["reward"] for a in answers] == pytest.approx(expected, abs=1e-5)
    assert all(row["scores"] == {} and row["refusals"] is None for row in results["rows"])


def test_a_model_that_never_ends_an_answer_has_zeros_everywhere(config, llama, first):
    models = {"endless": str(llama), "one": str(first)}
    results, _ = run(config(models=models, generation={"max_new_tokens": 2}))
    endless = results["rows"][0]
    assert endless["ended"]["mean"] == 0
    assert set(endless["scores"]) == {"score", "correct", "refused"}
    assert all(found["mean"] == 0 for found in endless["scores"].values())
    assert "never ended" in results["notes"]["judge"]


def test_a_stopped_run_goes_on_behind_the_draws_it_had_finished(config, monkeypatch, first):
    whole, whole_answers = run(config("whole", reference="one"))
    from align.evaluation import answering

    loaded: list[str] = []
    load = answering.load_any_policy

    def once(path: str):
        loaded.append(path)
        if len(loaded) == 2:
            raise KeyboardInterrupt
        return load(path)

    monkeypatch.setattr(answering, "load_any_policy", once)
    with pytest.raises(Stopped):
        run(config("stopped", reference="one"))
    results, answers = run(config("stopped", reference="one"))
    # The reference comes last and is loaded again; the other model is not.
    assert loaded[2:] == [str(first)]
    assert answers == whole_answers
    for row, expected in zip(results["rows"], whole["rows"], strict=True):
        assert row | {"seconds": 0} == expected | {"seconds": 0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": "won"}, "reference: no model is called `won`\n.*did you mean `one`"),
        ({"baseline": "zzz"}, "the models are `one`, `two`"),
        ({"best_of": {"twoo": 2}, "reward_model": "x"}, "best_of.twoo: no model"),
        ({"best_of": {"two": 2}}, "best_of: the best answer is chosen by a reward model"),
        ({"judge": None}, "judge: nothing scores the answers"),
        ({"judge": "leters"}, "did you mean `letters`"),
    ],
)
def test_what_is_refused_before_anything_is_loaded(config, changes, message, tmp_path):
    changes = {key: value for key, value in changes.items() if key != "reward_model"} | (
        {"reward_model": str(tmp_path.parent)} if "reward_model" in changes else {}
    )
    with pytest.raises(AlignError, match=message):
        run(config(**changes))
    assert not list(tmp_path.iterdir())


def test_models_of_other_families_have_no_divergence(config, first, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(first, other)
    template = (other / "chat_template.jinja").read_text()
    (other / "chat_template.jinja").write_text(template.replace("<|eot_id|>", " <|eot_id|>"))
    with pytest.raises(AlignError, match="differ in their tokens or chat templates"):
        run(config(models={"one": str(first), "two": str(other)}, reference="one"))
    results, _ = run(config(models={"one": str(first), "two": str(other)}))
    assert len(results["rows"]) == 4


def test_the_tables_go_to_stdout_and_names_are_made_harmless(
    config, first, reward_model, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "120")
    models = {"one": str(first), "bad\x1b[31m": str(first)}
    run_stage(config(models=models, reference="one", reward_model=str(reward_model)))
    shown = capsys.readouterr()
    for words in ("against one", "fact (4)", "of unsafe prompts", "never ended", "KL is"):
        assert words in shown.out
    assert "\x1b" not in shown.out + shown.err
    assert "bad\\x1b" in shown.out


def test_plain_prompts_without_tasks(config, tmp_path):
    file = tmp_path / "plain.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{n} and"}) + "\n" for n in range(4)))
    results, answers = run(config(data={"dataset_name": str(file)}))
    assert results["tasks"] == {}
    assert results["rows"][0]["refusals"] is None
    assert answers[1]["prompt"] == "1 and"
