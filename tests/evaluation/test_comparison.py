"""`align compare`: the numbers are those of `align eval`, a verdict each, nothing overwritten."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForSequenceClassification

from align.cli import main
from align.errors import AlignError
from align.evaluation import comparison
from align.evaluation.comparison import Comparison, compare, verdict, win_rate
from align.evaluation.comparison_view import markdown, sentences
from align.evaluation.statistics import paired_difference, wilson_interval
from align.registry import JUDGES
from align.runs import Stopped, run_stage
from align.stages.evaluate import EvalConfig

WORDS = ["boats", "isles", "lamps", "tools", "hens", "plums", "walls", "songs"]


def letters(row, completion: str) -> dict[str, float]:
    """A judge of the text alone."""
    return {"score": len(set(completion)) / 20}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(JUDGES, "letters", letters)


def talker(model: Path, folder: Path) -> str:
    """A copy that ends its answers on many tokens."""
    shutil.copytree(model, folder)
    settings = {"eos_token_id": [1, *range(60, 90)], "pad_token_id": 5}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return str(folder)


@pytest.fixture(scope="module")
def models(make_llama, tmp_path_factory) -> tuple[str, str]:
    home = tmp_path_factory.mktemp("models")
    return talker(make_llama(0), home / "one"), talker(make_llama(7), home / "two")


@pytest.fixture(scope="module")
def reward_model(llama, tokenizer, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("reward") / "artifact"
    AutoModelForSequenceClassification.from_pretrained(llama, num_labels=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def prompts(tmp_path) -> str:
    rows = [{"prompt": [{"role": "user", "content": f"Name {w}."}], "task": w} for w in WORDS]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def asked(models, prompts: str, **more) -> Comparison:
    options = {"judge": "letters", "max_new_tokens": 12, "temperature": 1.0, "seed": 3} | more
    return Comparison(*models, prompts=prompts, **{"output": Path("out.jsonl"), **options})


def rows_of(file: str = "out.jsonl") -> list[dict]:
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def test_scores_and_differences_are_those_of_align_eval(models, prompts, reward_model):
    summary = compare(asked(models, prompts, reward_model=reward_model), quiet=True)
    config = EvalConfig(
        output_dir="eval",
        models={"one": models[0], "two": models[1]},
        data={"dataset_name": prompts},
        generation={"temperatures": [1.0], "max_new_tokens": 12},
        judge="letters",
        reward_model=reward_model,
        baseline="two",
        seed=3,
    )
    results = json.loads((run_stage(config, quiet=True) / "artifact/results.json").read_text())
    first, second = results["rows"]
    assert summary["means"]["A"]["score"] == first["scores"]["score"]
    assert summary["means"]["B"]["reward"] == second["reward"]
    assert summary["difference"]["score"] == first["difference"]["scores"]["score"]
    assert summary["difference"]["reward"] == first["difference"]["reward"]
    assert summary["models"] == {"A": "one", "B": "two"}


def test_every_prompt_has_both_answers_and_a_verdict(models, prompts):
    summary = compare(asked(models, prompts), quiet=True)
    rows = rows_of()
    assert [row["row"]["task"] for row in rows] == WORDS
    for row in rows:
        a, b = row["a"], row["b"]
        for side in (a, b):
            score = letters({}, side["answer"])["score"] if side["ended"] else 0.0
            assert side["score"] == score
        want = "A" if a["score"] > b["score"] else "B" if a["score"] < b["score"] else "tie"
        assert row["verdict"] == want
        assert row["difference"] == a["score"] - b["score"]
    wins, losses = (sum(row["verdict"] == side for row in rows) for side in "AB")
    assert wins + losses > 0
    assert summary["verdicts"] == {"A": wins, "B": losses, "tie": len(rows) - wins - losses}
    rate = summary["win_rate"]
    assert (rate["low"], rate["high"]) == wilson_interval(wins, wins + losses)
    scores = [[row[side]["score"] for row in rows] for side in "ab"]
    assert summary["difference"]["score"] == (paired_difference(*scores, 0.95, 3).as_dict())


def test_a_model_against_itself_is_a_tie_everywhere(models, prompts, reward_model):
    both = (models[0], models[0])
    summary = compare(asked(both, prompts, judge=None, reward_model=reward_model), quiet=True)
    assert summary["verdicts"] == {"A": 0, "B": 0, "tie": len(WORDS)}
    assert summary["win_rate"] is None
    assert summary["decided_by"] == "reward"
    assert summary["same_text"] == len(WORDS)
    assert "no prompt is decided" in Path("out.md").read_text()


def test_the_order_of_the_models_mirrors_the_result(models, prompts):
    one = compare(asked(models, prompts), quiet=True)
    two = compare(asked(models[::-1], prompts, output=Path("o2.jsonl")), quiet=True)
    assert one["verdicts"]["A"] == two["verdicts"]["B"]
    assert np.isclose(one["difference"]["score"]["mean"], -two["difference"]["score"]["mean"])
    pairs = zip(rows_of(), rows_of("o2.jsonl"), strict=True)
    assert all(a["a"]["answer"] == b["b"]["answer"] for a, b in pairs)


def test_without_a_scorer_there_are_answers_and_no_verdict(models, prompts):
    summary = compare(asked(models, prompts, judge=None), quiet=True)
    assert summary["decided_by"] is None
    assert {row["verdict"] for row in rows_of()} == {None}
    assert "nothing scored" in Path("out.md").read_text()


@pytest.mark.parametrize("suffix", ["txt", "csv", "jsonl"])
def test_plain_prompts_become_turns_where_that_is_asked_for(models, tmp_path, suffix):
    lines = {
        "txt": "Name boats.\n\n  Name isles.\n",
        "csv": "prompt\nName boats.\nName isles.\n",
        "jsonl": '{"prompt": "Name boats."}\n{"prompt": "Name isles."}\n',
    }[suffix]
    file = tmp_path / f"p.{suffix}"
    file.write_text(lines)
    compare(asked(models, str(file), as_chat=suffix != "txt"), quiet=True)
    turns = [[{"role": "user", "content": f"Name {word}."}] for word in ("boats", "isles")]
    assert [row["prompt"] for row in rows_of()] == turns


def test_plain_text_without_a_template_is_said(models, tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text('{"prompt": "Name boats."}\n')
    compare(asked(models, str(tmp_path / "p.jsonl")))
    assert "--as-chat" in " ".join(capsys.readouterr().err.split())
    assert rows_of()[0]["prompt"] == "Name boats."


@pytest.mark.parametrize("name", ["out.jsonl", "out.md"])
def test_nothing_is_overwritten(models, prompts, name):
    Path(name).write_text("mine")
    with pytest.raises(AlignError, match="nothing is overwritten"):
        compare(asked(models, prompts), quiet=True)
    assert Path(name).read_text() == "mine"
    assert not list(Path.cwd().glob(".out*"))


def test_a_stopped_comparison_goes_on_behind_the_first_model(models, prompts, monkeypatch):
    make = comparison.make_sheets

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(comparison, "make_sheets", stop)
    with pytest.raises(Stopped):
        compare(asked(models, prompts), quiet=True)
    assert not Path("out.jsonl").exists()
    monkeypatch.setattr(comparison, "make_sheets", make)

    def loaded(*_, **__):
        raise AssertionError("the answers are there already")

    monkeypatch.setattr("align.evaluation.answering.load_any_policy", loaded)
    compare(asked(models, prompts), quiet=True)
    assert len(rows_of()) == len(WORDS)
    assert sorted(path.name for path in Path.cwd().iterdir()) == [
        "out.jsonl",
        "out.md",
        "prompts.jsonl",
    ]


def test_mistakes_are_told_before_anything_is_loaded(models, prompts, reward_model, tmp_path):
    with pytest.raises(AlignError, match="is a reward model, but a policy"):
        compare(asked((models[0], reward_model), prompts))
    with pytest.raises(AlignError, match="but a reward model is needed"):
        compare(asked(models, prompts, reward_model=models[0]))
    with pytest.raises(AlignError, match="no judge is called `letter`"):
        compare(asked(models, prompts, judge="letter"))
    with pytest.raises(AlignError, match="is no jsonl file"):
        compare(asked(models, prompts, output=Path("out.txt")))
    (tmp_path / "e.txt").write_text("\n\n")
    with pytest.raises(AlignError, match="holds no prompt"):
        compare(asked(models, str(tmp_path / "e.txt")))
    assert not list(Path.cwd().glob("*out*"))


def test_the_command_prints_a_table_or_json(models, prompts, capsys):
    words = ["compare", *models, "--prompts", prompts, "--judge", "letters"]
    with pytest.raises(SystemExit) as end:
        main([*words, "--max-new-tokens", "5", "--output", "c.jsonl"])
    assert end.value.code in (0, None)
    assert "decided by letters" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit):
        main([*words, "--max-new-tokens", "5", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["judge"] == "letters"
    assert Path("comparison.md").is_file()


def test_verdicts_and_rates_by_hand():
    assert verdict(1.0, 0.5, same=False) == "A"
    assert verdict(0.1, 0.5, same=False) == "B"
    assert verdict(0.5, 0.5, same=False) == "tie"
    assert verdict(1.0, 1.0 + 1e-7, same=True) == "tie"
    rows = [{"verdict": side} for side in "AAAB"] + [{"verdict": "tie"}] * 6
    rate = win_rate(rows, 0.95)
    assert rate["mean"] == 0.75
    assert rate["n"] == 4
    assert rate["low"] == pytest.approx(0.3006, abs=1e-4)  # Wilson 1927 for 3 of 4
    assert rate["high"] == pytest.approx(0.9544, abs=1e-4)


def test_texts_of_models_cannot_break_the_page(models, prompts):
    summary = compare(asked(models, prompts), quiet=True)
    row = rows_of()[0]
    row["a"]["answer"] = "````\n# not a heading\n\x1b[31m \u202e <img onerror=x>"
    row["a"]["model"] = "a|b<script>"
    row["verdict"] = "A"
    text = markdown({**summary, "models": {"A": "a|b<script>", "B": "two"}}, [row])
    assert "`````text\n````\n# not a heading" in text
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "\\|b\\<script\\>" in text
    assert sentences(summary)
