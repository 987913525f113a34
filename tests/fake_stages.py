"""Stages that take milliseconds: the real configs, with a `run` that writes text only.

Registered with `register(monkeypatch)`, or by `python fake_stages.py` for runs that are killed.
What a fake does is steered by a control file (FAKE_CONTROL), which is no part of the recipe and so
of no fingerprint.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from align import stages
from align.config.load import load_pipeline
from align.durable import read_json, write_json
from align.errors import fail
from align.lineage import identify
from align.pipeline import run_pipeline
from align.runs import RunFolder, run_stage
from align.stages.dpo import DPOConfig
from align.stages.evaluate import EvalConfig
from align.stages.reward import RewardConfig
from align.stages.sample import SampleConfig
from align.stages.sft import SFTConfig

CLASSES = {
    "sft": SFTConfig,
    "reward": RewardConfig,
    "sample": SampleConfig,
    "dpo": DPOConfig,
    "eval": EvalConfig,
}
PARTS = 4


def register(monkeypatch: Any) -> None:
    """Let every stage name lead to a fake."""
    for kind, found in CLASSES.items():
        monkeypatch.setitem(stages.STAGES, kind, f"fake_stages:{found.__name__}")


def control() -> dict[str, Any]:
    """What the fakes are told to do: `{"<stage>": "<what>"}`."""
    file = os.environ.get("FAKE_CONTROL")
    return (read_json(Path(file)) or {}) if file else {}


def obey(order: str | None, when: str, folder: RunFolder) -> None:
    """Carry out `fail <when>`, `bug <when>`, `kill <when>` or `sleep <when>`."""
    what, _, at = (order or "").partition(" ")
    if at != when:
        return
    if what == "fail":
        fail("the rows are wrong", where="data.jsonl row 3", hint="mend row 3")
    if what == "bug":
        raise ZeroDivisionError("a bug of ours with hf_abcdefghijklmnop in it")
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "term":
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(20)
    if what == "sleep":
        (folder.path / "asleep").touch()
        time.sleep(20)
        (folder.path / "asleep").unlink()


def run(config: Any, folder: RunFolder) -> None:
    """Write four parts, each once, then an artifact that depends on recipe and inputs alone."""
    order = control().get(folder.name)
    ran = os.environ.get("FAKE_RAN")
    if ran:
        with Path(ran).open("a", encoding="utf-8") as handle:
            handle.write(folder.name + "\n")
    obey(order, "at once", folder)
    for number in range(PARTS):
        part = folder.parts / f"{number}.json"
        if part.exists():
            continue
        write_json(part, {"attempt": folder.attempt})
        folder.log({"loss": 1 / (number + 1), "num_tokens": 10 * number}, step=number)
        obey(order, f"after {number}", folder)
    identity = identify(config)
    content = json.dumps([identity.parts["recipe"], identity.parts["inputs"]], sort_keys=True)
    (folder.artifact / "adapter_model.safetensors").write_text(content, encoding="utf-8")
    (folder.artifact / "adapter_config.json").write_text("{}", encoding="utf-8")
    if config.stage == "sample":
        for name in ("sft.jsonl", "pairs.jsonl", "samples.parquet"):
            (folder.artifact / name).write_text(content, encoding="utf-8")
    if config.stage == "eval":
        write_json(folder.artifact / "results.json", fake_results(config))
    if config.stage == "reward":
        folder.note("accuracy", 0.8431)
        folder.note("accuracy_from", "held-out split")
    folder.note("tokens", 1234)
    folder.note("loss", 0.5)


def fake_results(config: EvalConfig) -> dict[str, Any]:
    """Results as `align eval` writes them, with made-up numbers."""

    def mean(value: float) -> dict[str, Any]:
        return {"mean": value, "low": value - 0.02, "high": value + 0.02, "n": 400}

    rows = [
        {
            "label": name,
            "model": name,
            "temperature": temperature,
            "best_of": None,
            "scores": {"score": mean(0.5 + 0.1 * at)},
            "reward": mean(1.0 + at),
            "kl": {"k1": mean(0.25 * at)},
        }
        for at, name in enumerate(config.models)
        for temperature in config.generation.temperatures
    ]
    return {
        "prompts": 400,
        "judge": config.judge,
        "reference": config.reference,
        "confidence": config.confidence,
        "rows": rows,
    }


if __name__ == "__main__":
    sys.modules["fake_stages"] = sys.modules["__main__"]
    for stage, made in CLASSES.items():
        stages.STAGES[stage] = f"fake_stages:{made.__name__}"
    kind, text = sys.argv[1:]
    if kind == "pipeline":
        run_pipeline(load_pipeline(text))
    else:
        print(run_stage(CLASSES[kind].model_validate_json(text)))
