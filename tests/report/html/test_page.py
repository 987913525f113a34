"""The page: nothing in it is markup but ours, everything is in it, and what is missing is said."""

import base64
import hashlib
import json
import re
import shutil
import unicodedata
from pathlib import Path

import pytest
from report_pages import HOSTILE, MODELS, TOKEN, Folder, Page, answers, losses, results, whole

from align.report.html.gather import gather
from align.report.html.page import render

TAGS = {
    *(
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "header",
        "nav",
        "main",
        "footer",
        "section",
    ),
    *("article", "figure", "figcaption", "p", "h1", "h2", "h3", "h4", "ul", "li", "a", "b", "i"),
    *("bdi", "br", "code", "div", "span", "small", "ins", "del", "details", "summary", "dl", "dt"),
    *("dd", "table", "thead", "tbody", "tfoot", "tr", "th", "td"),
    *("svg", "path", "line", "text", "circle", "rect", "defs", "marker"),
}
"""Every element that the template and the drawings use. No script, no image, no frame, no form."""

SHOWN = {"\n", "\u200c", "\u200d"}


def page_of(folder: Path) -> Page:
    page = Page(render(gather(folder), "0" * 64))
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in page.attributes("href")} <= {*ids}, "every link leads somewhere"
    assert page.unbalanced == page.open == []
    return page


def gaps(page: Page) -> str:
    return page.text.partition("What is missing, and why")[2]


@pytest.fixture(scope="module")
def bad(hostile: Path) -> Page:
    return page_of(hostile)


def test_hostile_text_is_text(bad: Page) -> None:
    assert {tag for tag, _ in bad.tags} <= TAGS
    names = {name for _, attributes in bad.tags for name in attributes}
    assert not {name for name in names if name.startswith("on")}
    assert not names & {"src", "srcset", "style", "action", "formaction", "xlink:href", "data"}
    assert bad.text.count("<img src=http://evil.test/hit") > 20, "it is there, as text"
    assert "{{ 7 * 7 }}" in bad.text
    assert "-->" not in bad.html.replace("--&gt;", "")


def test_no_hidden_character_and_no_token_is_in_the_file(bad: Page) -> None:
    hidden = {"Cc", "Cf", "Cs", "Zl", "Zp"}
    found = {c for c in bad.html if unicodedata.category(c) in hidden} - SHOWN
    assert found == set()
    assert "\\x1b[2J" in bad.text
    assert "\\u202egnp.exe" in bad.text
    assert "\\u200b" in bad.text
    assert TOKEN not in bad.html
    assert "<secret>" in bad.text


def test_the_policy_allows_one_style_and_nothing_else(bad: Page) -> None:
    policies = [a for tag, a in bad.tags if tag == "meta" and a.get("http-equiv")]
    assert len(policies) == 1
    style = re.search("<style>(.*?)</style>", bad.html, re.S)
    assert style
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert policies[0]["content"] == (
        f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    before = bad.html.partition("http-equiv")[0]
    assert "<style" not in before, "the policy stands before what it governs"
    assert bad.html.count("<style") == 1


def test_nothing_is_asked_of_a_network(bad: Page) -> None:
    assert all(link.startswith("#") for link in bad.attributes("href"))
    assert not re.search(
        r"url\((?!#)|@import", re.search("<style>(.*?)</style>", bad.html, re.S)[1]
    )
    assert all(value == "url(#head)" for value in bad.attributes("marker-end"))


def test_the_first_screen_says_what_happened(complete: Path) -> None:
    page = page_of(complete)
    text = page.text
    assert "It worked: ppo beats sft, 0.500 → 0.700 at T = 1" in text
    assert "40 held-out prompts, scored by plain" in text
    assert "+0.200 at T = 1 [+0.150, +0.250], p < .001" in text
    first = text.partition("Lineage An arrow")[0]
    assert "1 of 3 tasks fell against sft (at T = 1): howto −0.200" in first
    assert "ppo alarm kl: plain" in first
    chart = text.partition("95 % intervals")[2]
    places = [chart.index(f" {name} ") for name in MODELS]
    assert places == sorted(places)


def test_every_section_is_there_and_nothing_is_missing(complete: Path) -> None:
    page = page_of(complete)
    heads = page.within("h2")
    for head in ("Lineage", "Tasks", "Samples", "Reward model", "Stages", "Recipe", "Cost"):
        assert head in heads
    titles = page.within("figcaption")
    for title in ("Rewards, model by model", "Lengths", "Reward against KL", "best: scores"):
        assert title in titles
    for title in (
        "best: best of N",
        "Calibration",
        "Accuracy by margin",
        "loss",
        "KL to the reference",
    ):
        assert title in titles
    assert gaps(page).strip().startswith("extra is optional and was not asked for (--with extra)")
    assert "cannot be drawn" not in page.text
    assert len(page.html) < 400_000


def test_values_have_their_origins(complete: Path) -> None:
    page = page_of(complete)
    cells = [text for tag, text in page.texts if tag in ("td", "bdi")]
    at = cells.index("trainer.learning_rate")
    assert cells[at + 1 : at + 3] == ["0.003", "pipeline.yaml:12"]
    for key, value in (
        ("trainer.seed", "42"),
        ("launch.num_processes", "1"),
        ("lora.use_dora", "false"),
    ):
        at = cells.index(key)
        assert cells[at + 1 : at + 3] == [value, "default"]


def test_no_path_of_this_machine_is_shown(complete: Path) -> None:
    assert "/gone" not in page_of(complete).html
    assert str(complete.parent.parent) not in page_of(complete).html


def test_differences_are_marked_against_the_parent(complete: Path) -> None:
    page = page_of(complete)
    assert "vs sft" in page.within("small")
    assert "ppo" in page.within("ins")
    assert "sft" in page.within("del")


# --- what is not there -----------------------------------------------------------------------


def test_a_pipeline_that_failed_half_way(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "runs" / "half")
    start = {"model": {"model_name_or_path": "$sft"}, "data": {"dataset_name": "rows"}}
    folder.stage("sft", "sft", start, metrics=losses())
    failed = "data.jsonl row 3: the rows are wrong <b>"
    folder.stage(
        "reward", "reward", start, needs=["sft"], metrics=losses(5), finished=False, failure=failed
    )
    folder.declare("dpo", "dpo", start, needs=["sft", "reward"])
    folder.declare("eval", "eval", {"models": {"dpo": "$dpo"}}, needs=["dpo"])
    page = page_of(folder.close())
    assert "Not finished: reward failed at step 5" in page.text
    assert failed in page.text
    assert "Complete: sft." in page.text
    assert "dpo is not there: the pipeline stopped at `reward`" in gaps(page).replace(
        "at reward", "at `reward`"
    )
    assert "no scores, answers or distributions: no evaluation left results" in gaps(page)
    assert page.within("figcaption").count("loss") == 2


def test_a_pipeline_of_which_a_part_has_run(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "runs" / "part")
    folder.stage("sft", "sft", {"model": {"model_name_or_path": "base"}}, metrics=losses())
    folder.declare("eval", "eval", {"models": {"sft": "$sft"}}, needs=["sft"])
    page = page_of(folder.close())
    assert "Part of the way: 1 of 2 stages have run" in page.text
    assert "eval is not there: it has not run yet" in gaps(page)


def test_no_evaluation(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "runs" / "alone")
    folder.stage("sft", "sft", {"model": {"model_name_or_path": "base"}}, metrics=losses())
    page = page_of(folder.close())
    assert "whether it got better is not known" in page.text
    assert "no evaluation is part of it: align eval makes one" in page.text


def test_numbers_that_are_none(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "runs" / "nan")
    lines = losses(20)
    for line in lines[10:]:
        line["loss"] = "nan"
        line["grad_norm"] = "inf"
    folder.stage("sft", "sft", {"model": {"model_name_or_path": "base"}}, metrics=lines)
    page = page_of(folder.close())
    assert "sft: loss is no finite number from step 11 on" in page.text
    assert "sft: grad_norm is no finite number from step 11 on" in page.text
    assert "loss" in page.within("figcaption")
    assert "nan" not in " ".join(page.attributes("d") + page.attributes("cx")).lower()


@pytest.mark.parametrize("name", ["results.json", "answers.parquet"])
@pytest.mark.parametrize("content", [None, "", "not what it was", '{"rows": [{"label": 3}]}'])
def test_a_broken_evaluation_is_said(complete: Path, name: str, content: str | None) -> None:
    file = complete / "eval" / "artifact" / name
    if content is None:
        file.unlink()
    else:
        file.write_text(content)
    page = page_of(complete)
    assert "eval damaged: artifact/" in page.text
    told = gaps(page)
    assert "no evaluation left results" in told or "cannot be" in told or "is not there" in told
    assert "Reward model" in page.within("h2")


@pytest.mark.parametrize(
    ("stage", "name", "told"),
    [
        ("reward", "artifact/reward_report.json", "no calibration and accuracy"),
        ("best", "artifact/report.json", "no scores of the samples"),
        ("ppo", "metrics.jsonl", "ppo has no curves"),
        ("ppo", "summary.json", ""),
        ("sft", "environment.json", ""),
    ],
)
def test_a_file_that_is_gone_costs_its_section_only(
    complete: Path, stage: str, name: str, told: str
) -> None:
    if name.startswith("artifact/"):  # not a damaged run: one of before this file was written
        lineage = complete / stage / "lineage.json"
        kept = json.loads(lineage.read_text())
        kept["outputs"]["files"].pop(name.removeprefix("artifact/"))
        lineage.write_text(json.dumps(kept))
    (complete / stage / name).unlink()
    page = page_of(complete)
    assert told in gaps(page)
    assert "It worked" in page.text
    assert "cannot be drawn" not in page.text


def test_nonsense_in_a_report_costs_its_section_only(complete: Path) -> None:
    file = complete / "reward" / "artifact" / "reward_report.json"
    size = file.stat().st_size
    file.write_text(json.dumps({"calibration": {"bins": "none"}, "accuracy": 7}).ljust(size))
    page = page_of(complete)
    assert "the reward model cannot be drawn" in gaps(page)
    assert "Reward against KL" in page.within("figcaption")


def test_an_older_stage_than_what_it_was_built_on(complete: Path) -> None:
    lineage = complete / "sft" / "lineage.json"
    lineage.write_text(lineage.read_text().replace("artifact of sft", "another artifact"))
    text = page_of(complete).text
    assert "ppo is out of date: it was built on another sft than the one here" in text


# --- one run ---------------------------------------------------------------------------------


def test_one_run_brings_what_it_stands_on_and_who_measured_it(
    complete: Path, tmp_path: Path
) -> None:
    (complete / "pipeline.json").unlink()
    run = gather(complete / "ppo")
    assert [stage.name for stage in run.stages] == ["sft", "reward", "ppo", "eval"]
    page = page_of(complete / "ppo")
    assert "It worked: ppo beats sft" in page.text
    assert [stage.name for stage in gather(complete / "eval").stages][-1] == "eval"
    assert "sft: score 0.500" in page_of(complete / "sft").text
    assert "reward orders 80 % of the pairs rightly" in page_of(complete / "reward").text
    alone = tmp_path / "elsewhere" / "ppo"
    shutil.copytree(complete / "ppo", alone)
    page = page_of(alone)
    assert "ppo is complete; whether it got better is not known" in page.text
    assert "--set" in page.within("td")
    assert "not kept" not in page.within("td")


def test_an_unfinished_run_by_either_name(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    config = {"model": {"model_name_or_path": "base"}}
    folder.stage("sft", "sft", config, metrics=losses(7), finished=False)
    for name in ("sft", "sft.partial"):
        assert "Not finished: sft stands at step 7" in page_of(tmp_path / name).text


# --- verdicts --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("models", "more", "head"),
    [
        ({"sft": 0.5, "ppo": 0.7}, {}, "It worked: ppo beats sft"),
        ({"sft": 0.7, "ppo": 0.5}, {}, "It did not work: ppo is worse than sft"),
        ({"sft": 0.5, "ppo": 0.51}, {}, "No clear difference between ppo and sft"),
        ({"sft": 0.5}, {}, "sft: score 0.500 [0.480, 0.520] at T = 1"),
        ({"sft": 0.5, "rs": 0.7, "ppo": 0.6}, {}, "rs scores higher than ppo: 0.700 (at T = 1)"),
    ],
)
def test_verdicts(tmp_path: Path, models: dict[str, float], more: dict, head: str) -> None:
    folder = Folder(tmp_path / "runs" / "x")
    config = {"model": {"model_name_or_path": "base"}}
    for name in models:
        folder.stage(name, "sft", config)
    folder.stage(
        "eval",
        "eval",
        {"models": {name: f"${name}" for name in models}},
        needs=[*models],
        files={"results.json": results(models, **more), "answers.parquet": answers(models)},
    )
    assert page_of(folder.close()).text.count(head) >= 1


@pytest.mark.parametrize(
    ("greedy", "head"),
    [
        (0.0, "Mixed: ppo against sft is better at T = 1, no clear difference greedy"),
        (-0.2, "Mixed: ppo against sft is better at T = 1, worse greedy"),
    ],
)
def test_a_verdict_that_depends_on_the_temperature(
    tmp_path: Path, greedy: float, head: str
) -> None:
    folder = Folder(tmp_path / "runs" / "x")
    found = results({"sft": 0.5, "ppo": 0.7})
    found["rows"][3]["difference"]["scores"]["score"] = {
        "mean": greedy, "low": greedy - 0.1, "high": greedy + 0.1, "p": 0.3, "n": 40,
    }  # fmt: skip
    for name in ("sft", "ppo"):
        folder.stage(name, "sft", {"model": {"model_name_or_path": "base"}})
    models = {"models": {"sft": "$sft", "ppo": "$ppo"}}
    needs = ["sft", "ppo"]
    folder.stage("eval", "eval", models, needs=needs, files={"results.json": found})
    assert head in page_of(folder.close()).text


def test_without_a_judge_the_reward_is_compared_and_that_is_said(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "runs" / "x")
    found = results({"sft": 0.5, "ppo": 0.7}, judge=None, tasks={})
    for row in found["rows"]:
        row["scores"], row["tasks"] = {}, {}
        if row["difference"]:
            row["difference"]["scores"], row["difference"]["tasks"] = {}, {}
    folder.stage(
        "eval", "eval", {"models": {"sft": "org/a", "ppo": "org/b"}},
        files={"results.json": found, "answers.parquet": answers({"sft": 0.5, "ppo": 0.7})},
    )  # fmt: skip
    page = page_of(folder.close())
    assert "It worked: ppo beats sft, 1.000 → 1.400 at T = 1" in page.text
    assert "40 held-out prompts, mean reward." in page.text
    assert "no judge scored the answers" in page.text
    assert "no results by task: the evaluation's rows have no column task" in gaps(page)


def test_reward_hacking_is_named(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "runs" / "x")
    models = {"sft": 0.7, "ppo": 0.5}
    found = results(models)
    for row in found["rows"]:
        if row["difference"]:
            row["difference"]["reward"] = {"mean": 2.0, "low": 1.5, "high": 2.5, "p": 0.0, "n": 40}
    for name in models:
        folder.stage(name, "sft", {"model": {"model_name_or_path": "base"}})
    folder.stage(
        "eval", "eval", {"models": {"sft": "$sft", "ppo": "$ppo"}}, needs=[*models],
        files={"results.json": found},
    )  # fmt: skip
    assert (
        "the reward rose while the score fell (at T = 1): reward hacking"
        in page_of(folder.close()).text
    )


def test_a_whole_hostile_pipeline_has_every_section_too(bad: Page) -> None:
    assert "cannot be drawn" not in bad.text
    assert "Calibration" in bad.within("figcaption")
    assert HOSTILE.count("<script>") == 1


def test_text_that_reads_from_right_to_left_is_kept_apart(tmp_path: Path) -> None:
    page = page_of(whole(tmp_path / "x", "שלום עולם"))
    assert "שלום עולם" in page.text
    assert "auto" in page.attributes("dir")
    assert any(tag == "bdi" for tag, _ in page.tags)


def test_a_push_that_failed_hides_no_verdict(complete: Path) -> None:
    file = complete / "pipeline.json"
    kept = json.loads(file.read_text())
    config = {"run": "$ppo", "output_dir": "/gone/far/push"}
    push = {"kind": "push", "needs": ["ppo"], "config": config, "failure": "the Hub answered 500"}
    kept["stages"]["push"] = push
    kept["chosen"].append("push")
    file.write_text(json.dumps(kept))
    text = page_of(complete).text
    assert "It worked: ppo beats sft" in text
    assert "push failed: the Hub answered 500" in text
