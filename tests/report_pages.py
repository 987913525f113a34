"""For tests of the report: a pipeline's folder with made-up numbers and hostile text, and a reader of pages."""

import json
import math
import random
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

HOSTILE = (
    "<img src=http://evil.test/hit onerror=\"document.title='owned'\">"
    "</script><script>document.title='owned'</script></style><style>@import 'http://evil.test/hit'</style>"
    "<svg onload=document.title='owned'><a href=javascript:alert(1)>x</a></svg>"
    "--><!-- {{ 7 * 7 }} {% raw %} ]]>"
    "\x1b[2J\x1b]52;c;YQ==\x07\x9b31m\x00\r\b"
    "\u202egnp.exe\u2066\u200b\u2060\ufeff\u00ad\u2028 \"'`$(x)` hf_abcdefghijklmnopqrstuvwxyz"
    " onclick=alert(1) http://a:b@c api_key=abc"
)
"""Markup, template code, terminal controls, bidi and invisible characters, an access token."""

TOKEN = "hf_abcdefghijklmnopqrstuvwxyz"

TASKS = ("fact", "howto", HOSTILE)


class Folder:
    """Writes runs as `align` leaves them."""

    def __init__(self, root: Path, text: str = "plain") -> None:
        self.root, self.text = root, text
        self.stages: dict[str, dict[str, Any]] = {}
        self.chosen: list[str] = []
        root.mkdir(parents=True, exist_ok=True)

    def stage(
        self,
        name: str,
        kind: str,
        config: Mapping[str, Any],
        *,
        needs: Sequence[str] = (),
        files: Mapping[str, Any] | None = None,
        metrics: Sequence[Mapping[str, Any]] = (),
        summary: Mapping[str, Any] | None = None,
        finished: bool = True,
        **told: Any,
    ) -> Path:
        """A stage that ran, finished or not."""
        self.declare(name, kind, config, needs=needs, **told)
        home = self.root / (name if finished else f"{name}.partial")
        (home / "artifact").mkdir(parents=True)
        written = {}
        for file, content in (files or {"adapter_model.safetensors": name}).items():
            path = home / "artifact" / file
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:
                path.write_text(content if isinstance(content, str) else json.dumps(content))
            written[file] = {"size": path.stat().st_size, "sha256": f"{name}/{file}"}
        lineage: dict[str, Any] = {
            "stage": kind,
            "name": name,
            "fingerprint": f"print of {name}",
            "parts": {"stage": kind},
            "inputs": [
                {
                    "key": "reward_model" if need == "reward" else f"models.{need}",
                    "path": f"/gone/far/{need}",
                    "sha256": f"artifact of {need}",
                }
                for need in needs
            ]
            + [
                {
                    "key": "data[0]",
                    "path": f"/gone/far/{self.text}.jsonl",
                    "kind": "data",
                    "rows": 9,
                }
            ],
            "data": {"train": {"rows": 100, "kept": 100}},
        }
        if finished:
            lineage["outputs"] = {"artifact": f"artifact of {name}", "files": written}
        environment = {"cpu": self.text, "cpu_cores": 2, "versions": {"torch": "2.13"}}
        head = {"stage": kind, "name": name, "attempts": 1, "seconds": 12.5, "tokens": 4321}
        for file, content in (
            ("lineage.json", lineage),
            ("environment.json", environment),
            ("summary.json", head | dict(summary or {})),
            ("recipe.yaml", {"stage": kind, "output_dir": f"/gone/far/{name}", **config}),
            ("origins.json", {"output_dir": "--set"}),
        ):
            (home / file).write_text(json.dumps(content))
        lines = [json.dumps({"stage": name, "attempt": 1, **line}) for line in metrics]
        (home / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
        return home

    def declare(
        self,
        name: str,
        kind: str,
        config: Mapping[str, Any],
        *,
        needs: Sequence[str] = (),
        optional: bool = False,
        **told: Any,
    ) -> None:
        """A stage of the pipeline, whether it ran or not."""
        config = {"output_dir": f"/gone/far/{name}", **config}
        self.stages[name] = {"kind": kind, "needs": [*needs], "config": config, **told}
        if not optional:
            self.chosen.append(name)

    def close(self) -> Path:
        """Write pipeline.json."""
        record = {
            "recipe": f"/gone/far/{self.text}.yaml",
            "chosen": self.chosen,
            "seconds": 77.0,
            "stages": self.stages,
        }
        (self.root / "pipeline.json").write_text(json.dumps(record))
        return self.root


def mean(value: float, n: int = 40) -> dict[str, Any]:
    return {"mean": value, "low": value - 0.02, "high": value + 0.02, "n": n}


def change(value: float, spread: float = 0.05) -> dict[str, Any]:
    return {"mean": value, "low": value - spread, "high": value + spread, "p": 0.0004, "n": 40}


def results(models: Mapping[str, float], text: str = "plain", **more: Any) -> dict[str, Any]:
    """results.json: model -> its score at T = 1; greedy is a tenth higher, the reward twice the score."""
    base = models.get("sft", 0.5)
    rows = []
    for at, (name, score) in enumerate(models.items()):
        for temperature in (1.0, 0.0):
            value = score + (0.0 if temperature else 0.1)
            tasks = {
                task: {"n": 10, "scores": {"score": mean(value)}}
                for task in ("fact", "howto", text)
            }
            differences = {
                "fact": {"score": change(score - base)},
                "howto": {"score": change(base - score if name == "ppo" else 0.0)},
                text: {"score": change(0.0)},
            }
            difference = {
                "to": "sft",
                "scores": {"score": change(score - base)},
                "reward": change(2 * (score - base)),
                "tasks": differences,
            }
            rows.append(
                {
                    "label": name,
                    "model": name,
                    "temperature": temperature,
                    "best_of": None,
                    "scores": {"score": mean(value), text: mean(0.5)},
                    "reward": mean(2 * value),
                    "kl": {"k1": mean(0.4 * at), "k3": mean(0.4 * at)},
                    "ended": mean(0.99),
                    "tokens": mean(15.0),
                    "tasks": tasks,
                    "refusals": {"unsafe": mean(0.9), "safe": mean(0.01)},
                    "difference": None if name == "sft" else difference,
                }
            )
    return {
        "prompts": 40,
        "tasks": {"fact": 10, "howto": 10, text: 10},
        "judge": text,
        "reward_model": "/gone/far/reward",
        "reference": "sft",
        "baseline": "sft",
        "confidence": 0.95,
        "rows": rows,
    } | more


def answers(models: Mapping[str, float], text: str = "plain", prompts: int = 12) -> bytes:
    """answers.parquet."""
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    rng = random.Random(0)
    rows = []
    for name, score in models.items():
        for temperature in (1.0, 0.0):
            for index in range(prompts):
                task = ("fact", "howto", text)[index % 3]
                rows.append(
                    {
                        "model": name,
                        "temperature": temperature,
                        "best_of": None,
                        "prompt_index": index,
                        "prompt": json.dumps([{"role": "user", "content": f"{index} {text}"}]),
                        "row": json.dumps({"task": task}),
                        "answer": f"{name} says {index}. {text}",
                        "tokens": rng.randrange(1, 60),
                        "ended": rng.random() < 0.9,
                        "score": min(1.0, max(0.0, rng.gauss(score, 0.2))),
                        "reward": rng.gauss(score, 1.0),
                    }
                )
    schema = [("best_of", arrow.int64())]
    table = arrow.Table.from_pylist(rows)
    table = table.set_column(
        table.schema.get_field_index("best_of"),
        arrow.field(*schema[0]),
        arrow.nulls(len(rows), arrow.int64()),
    )
    sink = arrow.BufferOutputStream()
    parquet.write_table(table, sink)
    found: bytes = sink.getvalue().to_pybytes()
    return found


def losses(steps: int = 30, **more: float) -> list[dict[str, Any]]:
    """metrics.jsonl of a training stage."""
    return [
        {"step": step, "loss": 1 / (1 + step), "grad_norm": 1.0, "learning_rate": 1e-3, **more}
        for step in range(1, steps + 1)
    ]


def rollouts(text: str, steps: int = 20) -> list[dict[str, Any]]:
    """metrics.jsonl of PPO, with an alarm."""
    found: list[dict[str, Any]] = [
        {
            "step": step,
            "objective/scores": math.log1p(step),
            "objective/kl": 0.05 * step,
            "completions/mean_length": 15 + step,
            "completions/eos_rate": 0.99,
            "val/explained_variance": 0.5,
        }
        for step in range(1, steps + 1)
    ]
    alarm = {"alarm": "kl", "reason": text, "remedy": text, "rollout": 9, "step": 18}
    return [*found[:18], alarm, *found[18:]]


GROWTH = [
    {"n": n, "mean": 0.1, "median": 0.1, "max": 0.1 + 0.2 * at} for at, n in enumerate((1, 2, 4, 8))
]

SAMPLES = {
    "completions": 80,
    "prompts": 10,
    "score": {"mean": 0.1, "histogram": {"counts": [1, 5, 2], "edges": [-1.0, 0.0, 1.0, 2.0]}},
    "growth": GROWTH,
}

REWARD = {
    "pairs": 200,
    "pairs_from": "held-out split",
    "accuracy": {"value": 0.8, "low": 0.74, "high": 0.85, "pairs": 200},
    "by_margin": [
        {"from": 0.1, "to": 0.4, "value": 0.7, "low": 0.6, "high": 0.8, "pairs": 100},
        {"from": 0.5, "to": 0.9, "value": 0.9, "low": 0.8, "high": 0.95, "pairs": 100},
    ],
    "length": {
        "correlation": 0.01,
        "longer_chosen": {"value": 0.8, "low": 0.7, "high": 0.9, "pairs": 90},
        "shorter_chosen": {"value": 0.8, "low": 0.7, "high": 0.9, "pairs": 90},
    },
    "calibration": {
        "bins": [
            {"confidence": 0.6, "accuracy": 0.55, "pairs": 90},
            {"confidence": 0.9, "accuracy": 0.92, "pairs": 110},
        ],
        "expected_error": 0.03,
    },
}

MODELS = {"base": 0.1, "sft": 0.5, "rs": 0.6, "dpo": 0.65, "ppo": 0.7}


def whole(root: Path, text: str = "plain") -> Path:
    """base -> SFT -> reward -> RS -> DPO -> PPO -> eval, all complete, with `text` wherever text can be."""
    folder = Folder(root, text)
    origins = {"model.model_name_or_path": text, "trainer.learning_rate": "pipeline.yaml:12"}
    base = {"model": {"model_name_or_path": text}, "data": {"dataset_name": text}}
    start = {"model": {"model_name_or_path": "$sft"}, "data": {"dataset_name": text}}
    trainer = {"trainer": {"learning_rate": 0.003}}
    folder.stage(
        "sft", "sft", base | trainer, metrics=losses(), origins=origins, summary={"loss": 0.5}
    )
    folder.stage(
        "reward",
        "reward",
        start,
        needs=["sft"],
        files={"reward_report.json": REWARD},
        metrics=losses(),
    )
    folder.stage(
        "best",
        "sample",
        start | {"scorer": {"reward_model": "$reward"}},
        needs=["sft", "reward"],
        files={"report.json": SAMPLES | {"warnings": [text]}},
    )
    folder.stage("rs", "sft", start, needs=["sft", "best"], metrics=losses())
    folder.stage("dpo", "dpo", start, needs=["sft", "best"], metrics=losses())
    folder.stage(
        "ppo",
        "ppo",
        start | {"scorer": {"reward_model": "$reward"}},
        needs=["sft", "reward"],
        metrics=rollouts(text),
        summary={"alarms": {"kl": 9}, "note": text},
    )
    folder.declare("extra", "sft", start, needs=["sft"], optional=True)
    scores = MODELS if text == "plain" else {text: 0.3} | MODELS
    models = {name: f"${name}" for name in MODELS if name != "base"} | {"base": text}
    folder.stage(
        "eval",
        "eval",
        {"models": models, "data": {"dataset_name": text}, "judge": "exact"},
        needs=["sft", "rs", "dpo", "ppo", "reward"],
        files={
            "results.json": results(scores, text),
            "answers.parquet": answers(scores, text),
        },
    )
    return folder.close()


VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """Elements, attributes and text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.unbalanced: list[str] = []
        self.texts: list[tuple[str, str]] = []
        """Innermost element, and its text."""
        self.html = html
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1] == tag:
            self.open.pop()
        else:
            self.unbalanced.append(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    @property
    def text(self) -> str:
        """All text but the style sheet."""
        return " ".join("".join(t for tag, t in self.texts if tag != "style").split())

    def attributes(self, name: str) -> list[str]:
        """All values of an attribute."""
        return [str(found[name]) for _, found in self.tags if name in found]

    def within(self, tag: str) -> list[str]:
        """The texts of all elements of a name."""
        return [text for name, text in self.texts if name == tag]
