"""`align compare`: two models on the same prompts, answer by answer.

Answers and scores are those of `align eval`: the same draws, judges and reward models, and a
stopped comparison goes on behind the models that had answered. What is added is a verdict for every
prompt. Judges and reward models see one answer at a time and never the two together, so there is no
order of presentation that could favour one of them.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from align.config.sections import DataSection
from align.durable import write_text
from align.errors import fail
from align.evaluation.answering import answer_all
from align.evaluation.results import make_results
from align.evaluation.sheets import Sheet, make_sheets
from align.evaluation.statistics import Interval, wilson_interval
from align.generation.answers import Prompt
from align.generation.samples import as_json
from align.lineage import identify
from align.locks import locked
from align.models.identity import require_reward_model
from align.models.loading import policy_section
from align.models.source import artifact_of, find_model, two_names
from align.report.terminal import say
from align.resources import find_path
from align.runs import RunFolder
from align.stages.evaluate import EvalConfig, EvalGeneration, check_names
from align.stopping import stoppable

Verdict = Literal["A", "B", "tie"]

ORDER = "each answer is scored by itself, so the order of presentation plays no part"


@dataclass(frozen=True)
class Comparison:
    """What is to be compared, on what, and by whom."""

    a: str
    b: str
    """What `find_model` takes."""
    prompts: str
    """File, folder, data card or Hub id, as `data.dataset_name`; a .txt file has a prompt a line."""
    output: Path
    """The jsonl file; a summary in Markdown lies beside it. Neither is ever overwritten."""
    judge: str | None = None
    reward_model: str | None = None
    split: str = "train"
    as_chat: bool = False
    """Ask prompts that are plain text as a user's turn."""
    system: str | None = None
    max_samples: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 512
    batch_size: int = 64
    seed: int = 42
    confidence: float = 0.95


def compare(asked: Comparison, *, quiet: bool = False) -> dict[str, Any]:
    """Let both models answer every prompt, score the answers, write them with their verdicts.

    Returns:
        The summary: wins, win rate with Wilson's interval (ties left out), mean scores, and the
        paired difference A - B with its bootstrap interval and p-value.

    Raises:
        AlignError: anything to mend in models, prompts or scorers; an output that is there already.
            `Stopped` after Ctrl-C: the same command goes on.
    """
    output = asked.output.expanduser().absolute()
    _refuse_existing(output)
    with _rows_file(asked.prompts) as rows, stoppable():
        config = _config(asked, rows)
        identity = identify(config)
        work = output.with_name(f".{output.name}.{identity.fingerprint[:12]}")
        config = config.model_copy(update={"output_dir": str(work)})
        with locked(work):
            folder = RunFolder(config, name="compare", quiet=quiet, identity=identity)
            try:
                summary, lines, text = _compared(asked, config, folder)
            except BaseException:
                if not folder.wrote_something():
                    folder.discard()
                raise
            _refuse_existing(output)
            write_text(output, "".join(line + "\n" for line in lines))
            write_text(output.with_suffix(".md"), text)
            shutil.rmtree(folder.path)
    return summary


def _refuse_existing(output: Path) -> None:
    if output.suffix != ".jsonl":
        fail(
            "is no jsonl file",
            where=f"--output {output.name}",
            hint="name it so; a Markdown file is written beside it",
        )
    for file in (output, output.with_suffix(".md")):
        if file.exists():
            fail(
                "is there already, and nothing is overwritten",
                where=f"--output {file}",
                hint="choose another name, or move the file away",
            )


@contextmanager
def _rows_file(prompts: str) -> Iterator[str]:
    """The prompts as `align.data` reads them; the lines of a .txt file become users' turns."""
    file = Path(find_path(prompts, rooms=("datasets",)) or prompts).expanduser()
    if file.suffix.lower() != ".txt" or not file.is_file():
        yield str(file) if file.exists() else prompts
        return
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        fail(f"is not UTF-8 text ({error})", where=prompts, hint="save it as UTF-8")
    if not any(lines):
        fail("holds no prompt", where=prompts, hint="write one on every line")
    with tempfile.TemporaryDirectory(prefix="align-compare-") as folder:
        made = Path(folder) / f"{file.stem}.jsonl"
        rows = (json.dumps({"instruction": line}) + "\n" for line in lines if line)
        made.write_text("".join(rows), encoding="utf-8")
        yield str(made)


def _config(asked: Comparison, rows: str) -> EvalConfig:
    sources = find_model(asked.a), find_model(asked.b)
    names = two_names(*sources)
    for source in sources:
        policy_section(source.path)  # a reward model is refused before anything is loaded
    reward_model = None if asked.reward_model is None else artifact_of(asked.reward_model)[0]
    if reward_model is not None:
        require_reward_model(reward_model)
    config = EvalConfig(
        output_dir="",
        models={name: source.path for name, source in zip(names, sources, strict=True)},
        data=DataSection(
            dataset_name=rows,
            dataset_train_split=asked.split,
            columns={"instruction": "prompt"} if asked.as_chat else None,
            system_prompt=asked.system,
            max_samples=asked.max_samples,
            max_length=None,
        ),
        generation=EvalGeneration(
            temperatures=[asked.temperature],
            top_p=asked.top_p,
            max_new_tokens=asked.max_new_tokens,
            generation_batch_size=asked.batch_size,
        ),
        judge=asked.judge,
        reward_model=reward_model,
        baseline=names[1],
        seed=asked.seed,
        confidence=asked.confidence,
    )
    if config.judge or config.reward_model:
        check_names(config)
    return config


def _compared(
    asked: Comparison, config: EvalConfig, folder: RunFolder
) -> tuple[dict[str, Any], list[str], str]:
    """The summary, the lines of the jsonl file and the Markdown."""
    from align.evaluation.comparison_view import markdown

    answers = answer_all(config, folder)
    first, second = make_sheets(config, answers)
    prompts = answers.prompts[first.model]
    if prompts[0].is_text and not folder.quiet:
        say(
            "compare: the prompts are plain text and get no chat template, as in `align eval`; "
            "--as-chat asks each as a user's turn",
            style="yellow",
        )
    rows = make_rows(prompts, first, second)
    results = make_results(config, answers, [first, second])["rows"]
    summary = _summary(asked, config, rows, results)
    return summary, [as_json(row) for row in rows], markdown(summary, rows)


def values(sheet: Sheet) -> list[float] | None:
    """What decides: the judge's score, else the reward, else nothing."""
    if "score" in sheet.scores:
        return [float(score) for score in sheet.scores["score"]]
    return sheet.rewards


def verdict(first: float, second: float, *, same: bool) -> Verdict:
    """The better answer; equal texts and equal numbers are a tie."""
    if same or first == second:
        return "tie"
    return "A" if first > second else "B"


def make_rows(prompts: Sequence[Prompt], first: Sheet, second: Sheet) -> list[dict[str, Any]]:
    """One row for every prompt: both answers, their scores, the verdict."""
    scored = values(first), values(second)
    rows = []
    for at, prompt in enumerate(prompts):
        found: dict[str, Any] = {"index": prompt.index, "prompt": prompt.row["prompt"]}
        for side, sheet in (("a", first), ("b", second)):
            answer = sheet.answers[at]
            found[side] = {
                "model": sheet.model,
                "answer": answer.text,
                "ended": answer.ended,
                "tokens": len(answer.all_ids),
                "score": None if "score" not in sheet.scores else float(sheet.scores["score"][at]),
                "parts": answer.verdict or None,
                "reward": None if sheet.rewards is None else sheet.rewards[at],
            }
        if scored[0] is not None and scored[1] is not None:
            one, two = scored[0][at], scored[1][at]
            same = first.answers[at].all_ids == second.answers[at].all_ids
            found["difference"] = 0.0 if same else one - two
            found["verdict"] = verdict(one, two, same=same)
        else:
            found |= {"difference": None, "verdict": None}
        found["row"] = {key: value for key, value in prompt.row.items() if key != "prompt"}
        rows.append(found)
    return rows


def win_rate(rows: Sequence[Mapping[str, Any]], confidence: float) -> dict[str, Any] | None:
    """Share of A's wins among the prompts that one side wins, with Wilson's interval."""
    wins, losses = (sum(row["verdict"] == side for row in rows) for side in ("A", "B"))
    decided = wins + losses
    if not decided:
        return None
    low, high = wilson_interval(wins, decided, confidence)
    return Interval(wins / decided, low, high, decided, "wilson").as_dict()


def _summary(
    asked: Comparison,
    config: EvalConfig,
    rows: Sequence[Mapping[str, Any]],
    results: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    first, second = results
    by = "score" if config.judge else "reward" if config.reward_model else None
    names = list(config.models)
    difference = first["difference"]
    return {
        "models": {"A": names[0], "B": names[1]},
        "prompts": len(rows),
        "judge": config.judge,
        "reward_model": None if config.reward_model is None else asked.reward_model,
        "decided_by": by,
        "verdicts": {
            side: sum(row["verdict"] == side for row in rows) for side in ("A", "B", "tie")
        },
        "win_rate": win_rate(rows, config.confidence) if by else None,
        "difference": {
            "score": difference["scores"].get("score"),
            "reward": difference["reward"],
        },
        "means": {
            side: {
                "score": row["scores"].get("score"),
                "reward": row["reward"],
                "ended": row["ended"],
                "tokens": row["tokens"],
            }
            for side, row in (("A", first), ("B", second))
        },
        "same_text": sum(row["a"]["answer"] == row["b"]["answer"] for row in rows),
        "settings": {
            "temperature": asked.temperature,
            "top_p": asked.top_p,
            "max_new_tokens": asked.max_new_tokens,
            "seed": asked.seed,
            "confidence": asked.confidence,
        },
        "note": ORDER,
        "output": asked.output.name,
    }
