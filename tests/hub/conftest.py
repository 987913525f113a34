"""A real run of a few steps with its evaluation, and a Hub on this machine."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from local_hub import CANARY, LocalHub

from align.runs import run_stage

HOSTILE = "<img src=x onerror=alert(1)>\x1b[2J</pre><script>alert(2)</script> | `x` \u202e"


@pytest.fixture(scope="session")
def pipeline(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs `sft` (an adapter), `full` and `eval`, and their data with a card."""
    from align.registry import JUDGES
    from align.stages.evaluate import EvalConfig
    from align.stages.sft import SFTConfig

    root = tmp_path_factory.mktemp("pipeline")
    data = root / "data"
    data.mkdir()
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"{HOSTILE} Count to {n}."},
                {"role": "assistant", "content": " ".join(map(str, range(1, n + 1)))},
            ]
        }
        for n in range(2, 10)
    ]
    prompts = [{"prompt": row["messages"][:1]} for row in chats]
    for name, rows in (("train", chats), ("test", prompts)):
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (data / "card.yaml").write_text(
        "name: counting\ndescription: Counts.\nlicense: cc-by-4.0\nsource: https://example.org\n"
        "splits: {train: {file: train.jsonl}, test: {file: test.jsonl, format: prompts}}\n"
    )
    trainer = {"per_device_train_batch_size": 2, "max_steps": 3, "gradient_checkpointing": False}
    for name, merged in (("sft", False), ("full", True)):
        run_stage(
            SFTConfig.model_validate(
                {
                    "output_dir": str(root / name),
                    "model": {"model_name_or_path": str(llama)},
                    "lora": {"lora_r": 4},
                    "data": {"dataset_name": str(data)},
                    "trainer": trainer | {"learning_rate": 1e-2},
                    "merge_adapter": merged,
                }
            ),
            quiet=True,
        )
    JUDGES.setdefault("letters", lambda row, text: {"score": len(set(text)) / 300})
    run_stage(
        EvalConfig.model_validate(
            {
                "output_dir": str(root / "eval"),
                "models": {"mine": str(root / "sft" / "artifact")},
                "data": {"dataset_name": str(data), "dataset_train_split": "test"},
                "generation": {"max_new_tokens": 6, "temperatures": [0.0]},
                "judge": "letters",
            }
        ),
        quiet=True,
    )
    return root


@pytest.fixture(scope="session")
def reward(pipeline: Path, llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a reward model's adapter."""
    from align.stages.reward import RewardConfig

    root = tmp_path_factory.mktemp("reward")
    pairs = [
        {"prompt": f"Count to {n}.", "chosen": "1 2 3", "rejected": "no " * n} for n in range(2, 10)
    ]
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    config = {
        "output_dir": str(root / "reward"),
        "model": {"model_name_or_path": str(llama)},
        "lora": {"lora_r": 4},
        "data": {"dataset_name": str(root / "pairs.jsonl")},
        "trainer": {"max_steps": 2, "gradient_checkpointing": False, "learning_rate": 1e-2},
    }
    return run_stage(RewardConfig.model_validate(config), quiet=True)


@pytest.fixture
def run(pipeline: Path, tmp_path: Path) -> Path:
    """A copy of the adapter's run, with the evaluation beside it."""
    for name in ("sft", "eval"):
        shutil.copytree(pipeline / name, tmp_path / "runs" / name)
    return tmp_path / "runs" / "sft"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """The local Hub, with the real client pointed at it, a token set, and no waiting."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    from align.hub import account

    started = LocalHub(CANARY)
    monkeypatch.setenv("HF_TOKEN", CANARY)
    monkeypatch.setenv("HF_ENDPOINT", started.url)
    monkeypatch.setattr(constants, "ENDPOINT", started.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(_http.time, "sleep", lambda _: None)
    monkeypatch.setattr(account, "TIMEOUT", 20.0)
    yield started
    started.close()
