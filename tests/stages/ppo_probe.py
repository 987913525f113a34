"""A PPO stage that is killed on purpose; started as a process of its own.

`python ppo_probe.py FOLDER LLAMA SCENARIO...` prints one JSON line per scenario. Each run is a fork, so that
SIGKILL hits a real process; the run after it is the same call of `run_stage`.
"""

import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import ppo_runs  # noqa: E402

from align.generation import slots  # noqa: E402
from align.ppo import rollout  # noqa: E402
from align.ppo.trainer import PPOTrainer  # noqa: E402
from align.runs import run_stage  # noqa: E402
from align.training import callbacks  # noqa: E402

CONFIG: dict[str, Any] = {
    "num_ppo_epochs": 2,
    "kl_target": 0.5,
    "trainer": {"max_steps": 12, "save_steps": 3, "lr_scheduler_type": "linear"},
}


def digest(weights: dict[str, Any]) -> str:
    found = hashlib.sha256()
    for name in sorted(weights):
        found.update(name.encode() + weights[name].contiguous().numpy().tobytes())
    return found.hexdigest()


def hash_value_when_done() -> None:
    close = PPOTrainer.close

    def closing(trainer: PPOTrainer) -> None:
        close(trainer)
        value = {n: w for n, w in ppo_runs.weights(trainer).items() if "value" in n}
        trainer.folder.note("value", f"{len(value)} {digest(value)}")

    PPOTrainer.close = closing


def kill_at(order: str) -> None:
    """`update N`, `drawing N` (tokens of all rollouts), `looking N`, `saved N`: before it is through."""
    what, _, number = order.partition(" ")
    owner, name = {
        "update": (PPOTrainer, "training_step"),
        "drawing": (slots.SlotBatch, "run"),
        "looking": (rollout.Collector, "_models"),
        "saving": (callbacks, "write_manifest"),
        "saved": (callbacks, "keep_newest"),
    }[what]
    original, calls = getattr(owner, name), [0]

    def killing(*given: Any, **more: Any) -> Any:
        calls[0] += 1
        if calls[0] == int(number):
            if what == "drawing":  # one answer is there, the others are not
                next(iter(original(*given, **more)))
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*given, **more)

    setattr(owner, name, killing)


def forked(work: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def main(folder: Path, llama: Path, scenarios: list[str]) -> None:
    for number, order in enumerate(scenarios):
        place = folder / str(number)
        place.mkdir(parents=True)
        config = ppo_runs.ppo_config(llama, place, **CONFIG)

        def first(order: str = order, config: Any = config) -> None:
            hash_value_when_done()
            if order != "undisturbed":
                kill_at(order)
            run_stage(config, quiet=True)

        def second(config: Any = config) -> None:
            hash_value_when_done()
            run_stage(config, quiet=True)

        codes = [forked(first)]
        if order != "undisturbed":
            codes.append(forked(second))
        output = Path(config.output_dir)
        noted = json.loads((output / "summary.json").read_text()) if output.exists() else {}
        found = {
            "scenario": order,
            "codes": codes,
            "policy": digest(ppo_runs.artifact_weights(output / "artifact")),
            "value": noted.get("value"),
            "attempts": noted.get("attempts"),
            "samples": hashlib.sha256((output / "samples.jsonl").read_bytes()).hexdigest(),
        }
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
