"""What is kept of a group, and what the run says of all groups."""

import pytest

from align.generation.answers import Answer, Group, Prompt
from align.generation.rejection import demonstrations, keep_best, rule_groups
from align.generation.yields import duplicate_share, summary_lines, yield_report

CHAT = [{"role": "user", "content": "Why?"}]


def group(*answers: tuple[str, float, bool], index: int = 0) -> Group:
    return Group(
        index,
        [
            Answer(text, [9] * 3, 4 if ended else None, {"score": score})
            for text, score, ended in answers
        ],
    )


def kept(found: Group, **options) -> list[str]:
    defaults = {"count": 1, "min_score": None, "only_finished": True}
    keep_best(found, **(defaults | options))
    return [answer.text for answer in found.answers if answer.kept]


MIXED = (("low", 0.1, True), ("cut", 0.9, False), ("good", 0.8, True), ("good", 0.8, True))


def test_the_best_that_ended_is_kept_once():
    assert kept(group(*MIXED)) == ["good"]
    assert kept(group(*MIXED), count=4) == ["low", "good"]
    assert kept(group(*MIXED), only_finished=False) == ["cut"]
    assert kept(group(*MIXED), count=4, min_score=0.5) == ["good"]
    assert kept(group(*MIXED), min_score=0.85) == []
    assert kept(group(("", 1.0, True), ("text", 0.1, True))) == []


def test_demonstrations_take_the_form_of_the_prompt_the_best_first():
    chat, plain = group(*MIXED), group(*MIXED, index=1)
    for found in (chat, plain):
        kept(found, count=2)
    prompts = [Prompt(0, [1], {"prompt": CHAT}), Prompt(1, [1], {"prompt": "Q:"})]
    rows = demonstrations(prompts, [chat, plain])
    assert rows[0] == {"messages": [*CHAT, {"role": "assistant", "content": "good"}]}
    assert rows[1]["messages"][-1]["content"] == "low"
    assert rows[2:] == [
        {"prompt": "Q:", "completion": "good"},
        {"prompt": "Q:", "completion": "low"},
    ]


def test_demonstrations_keep_the_tools_of_their_prompt():
    found = group(*MIXED)
    kept(found)
    tools = [{"type": "function", "function": {"name": "songs"}}]
    (row,) = demonstrations([Prompt(0, [1], {"prompt": CHAT, "tools": tools})], [found])
    assert row["tools"] == tools
    assert row["messages"][:-1] == CHAT
    (row,) = demonstrations([Prompt(0, [1], {"prompt": "Q:", "tools": tools})], [found])
    assert "tools" not in row


def test_rules_see_the_row_and_no_empty_answer():
    found = group(*MIXED, ("", 1.0, True))
    prompt = Prompt(0, [1], {"prompt": CHAT, "task": "t"})
    finished = rule_groups([prompt], [found], only_finished=True)
    assert finished[0]["row"] == {"prompt": CHAT, "task": "t"}
    assert [c["text"] for c in finished[0]["completions"]] == ["low", "good", "good"]
    everything = rule_groups([prompt], [found], only_finished=False)
    assert {"text": "cut", "score": 0.9, "ended": False} in everything[0]["completions"]


def test_the_report_of_two_prompts():
    first, second = group(*MIXED), group(*(("same", 0.2, False),) * 4, index=1)
    kept(first)
    kept(second)
    prompt = Prompt(0, [1], {"prompt": CHAT})
    sft = demonstrations([prompt], [first])
    pairs = [{"prompt": CHAT, "margin": 0.7, "kind": "best_worst"}] * 2 + [{"prompt": "x"}]
    report = yield_report([first, second], sft, pairs)
    assert report["completions"] == 8
    assert report["tokens"] == 3 * 4 + 4 + 4 + 4 + 3 * 4 - 4 - 4 - 1
    assert report["finished"] == 3 / 8
    assert report["duplicates"] == duplicate_share([first, second]) == 4 / 8
    assert report["prompts_without_demonstration"] == 1
    assert report["kept_gap"] == pytest.approx(0.8 - 0.65)
    assert report["score"]["mean"] == pytest.approx((0.65 + 0.2) / 2)
    assert report["growth"][-1] == pytest.approx(
        {"n": 4, "mean": 0.425, "median": (0.8 + 0.2) / 2, "max": (0.9 + 0.2) / 2}
    )
    assert report["pairs_by_kind"] == {"best_worst": 2, "pair": 1}
    assert report["prompts_with_pair"] == 2
    assert report["mean_margin"] == pytest.approx(0.7)
    assert "max_new_tokens" in report["warnings"][0]
    assert any("2 best_worst, 1 pair" in line for line in summary_lines(report))
