"""Tokens in the environment, in files, in git and in recipes turn up in no file, log, card, repository or line.

Each canary is planted where people have them; then a pipeline is run with every failure of the Hub and
with crashes of its own, and all that was written, sent or printed is searched.
"""

import tempfile
from pathlib import Path

import pytest
import yaml
from huggingface_hub import HfApi, constants
from local_hub import CANARY, Fault

from align.cli import main
from align.registry import JUDGES
from align.secrets import _stored

WANDB = "0123456789abcdef0123456789abcdef01234567"
STORED = "plain-stored-canary-0123"
GIT = "ghp_GitCanaryGitCanary0123456789"
PASSWORD = "correct-horse-battery"
RECIPE = "hf_RecipeRecipeRecipe0123456789"
ALL = (CANARY, WANDB, STORED, GIT, PASSWORD, RECIPE)


@pytest.fixture
def planted(tmp_path, monkeypatch, hub, llama, pipeline) -> Path:
    """A working folder in which every kind of canary lies; what is written goes to `out`."""
    work, home, out = tmp_path / "work", tmp_path / "home", tmp_path / "out"
    for folder in (work / ".git", home / "accelerate", out / "tmp"):
        folder.mkdir(parents=True)
    remote = f"https://me:{GIT}@github.com/me/x.git"
    (work / ".git/config").write_text(
        f'[remote "origin"]\n\turl = {remote}\n[user]\n\tpassword = {PASSWORD}\n'
    )
    (home / "token").write_text(STORED)
    (home / "stored_tokens").write_text(f"[mine]\nhf_token = {CANARY}\n")
    (home / "accelerate/default_config.yaml").write_text(f"# {CANARY}\nnum_processes: 1\n")
    monkeypatch.chdir(work)
    for name, value in {
        "HF_HOME": str(home),
        "WANDB_API_KEY": WANDB,
        "MY_DATABASE_PASSWORD": PASSWORD,
        "GITHUB_TOKEN": GIT,
        "HUGGING_FACE_HUB_TOKEN": CANARY,
        "TMPDIR": str(out / "tmp"),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tempfile, "tempdir", str(out / "tmp"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    _stored.cache_clear()
    HfApi().create_repo("me/base")
    HfApi().upload_folder(repo_id="me/base", folder_path=llama)
    trainer = {"per_device_train_batch_size": 2, "max_steps": 1, "gradient_checkpointing": False}
    trainer["extra"] = {"run_name": f"run of {RECIPE} by {GIT}"}
    stages = {
        "sft": {
            "stage": "sft",
            "model": {"model_name_or_path": str(llama)},
            "lora": {"lora_r": 4},
            "data": {"dataset_name": str(pipeline / "data")},
            "trainer": trainer,
        },
        "push": {"stage": "push", "run": "$sft", "repo_id": "me/model", "base_model_id": "me/base"},
        "best": {
            "stage": "sample",
            "model": {"model_name_or_path": str(llama)},
            "data": {"dataset_name": str(pipeline / "data"), "dataset_train_split": "test"},
            "generation": {"num_generations": 2, "max_new_tokens": 2},
            "scorer": {"judge": "leaky"},
            "pairs": {"only_finished": False},
        },
    }
    monkeypatch.setitem(JUDGES, "leaky", lambda row, text: {"score": float(len(text))})
    recipe = {"output_dir": str(out / "runs"), "stages": stages}
    (work / "p.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    yield out
    _stored.cache_clear()


@pytest.fixture
def align(planted, hub, capfd):
    """Run a command, and search everything afterwards."""

    def call(*words: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as end:
            main(list(words))
        out, err = capfd.readouterr()
        for canary in ALL:
            assert canary not in out + err, (canary, words)
        assert leaks(planted, hub) == []
        return end.value.code or 0, " ".join(f"{out}\n{err}".split())

    return call


def leaks(out: Path, hub) -> list[tuple[str, str]]:
    """Where a canary is: files that were written, and what the Hub was sent."""
    held = {str(path): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for name, repo in hub.repos.items():
        for oid, files in repo.commits.items():
            held |= {f"{name}@{oid[:8]}/{path}": content for path, content in files.items()}
    return [
        (place, canary)
        for place, content in held.items()
        for canary in ALL
        if canary.encode() in content
    ]


FAULTS = [
    Fault("whoami", 401, message=f"bad {CANARY} of {PASSWORD}"),
    Fault("/commit/", 403, message=f"{CANARY} may not, {WANDB} neither"),
    Fault("/commit/", 409, message=f"try https://me:{GIT}@hub/x?token={CANARY}"),
    Fault("/preupload/", 500, times=9, message=f"at {STORED}, password={PASSWORD}"),
    Fault("PUT /lfs/", "timeout", times=9),
    Fault("PUT /lfs/", "reset", times=9),
    Fault("/commit/", "lost"),
]


@pytest.mark.slow
def test_no_canary_turns_up_anywhere(planted, hub, align, monkeypatch):
    def leaky(row, text):
        raise ValueError(f"no connection to https://me:{GIT}@host with {CANARY} and {WANDB}")

    def broken(config, folder):
        (folder.artifact / "begun").touch()
        leaky(None, "")

    # The first run trains; its push fails, and a stage behind it crashes with a traceback.
    hub.faults.append(Fault("/commit/", 500, message=f"no, {CANARY}"))
    with monkeypatch.context() as patch:
        patch.setattr("align.stages.sample.run", broken)
        code, said = align("run", "p.yaml")
    assert code == 1
    assert "no connection to https://me:<secret>@host with <secret> and <secret>" in said
    assert "push: not pushed, the other stages go on" in said
    assert "<secret>" in (planted / "runs/best.partial/log.txt").read_text()
    assert (planted / "runs/sft/artifact/adapter_model.safetensors").is_file()
    (planted / "runs/best.partial/artifact/begun").unlink()
    with monkeypatch.context() as patch:
        patch.setitem(JUDGES, "leaky", leaky)
        hub.faults.append(Fault("/commit/", 500))
        code, said = align("run", "p.yaml")
    assert code in (1, 2)
    assert "no connection to https://me:<secret>@host" in said
    for fault in FAULTS:
        hub.faults[:] = [fault]
        hub.objects.clear()  # else nothing is uploaded again
        with monkeypatch.context() as patch:
            if fault.how == "timeout":
                patch.setattr("align.hub.account.TIMEOUT", 0.4)
            assert align("run", "p.yaml")[0] in (1, 2), fault
        assert not (planted / "runs/push").exists()
    hub.faults.clear()
    assert align("run", "p.yaml")[0] == 0
    card = hub.files("me/model")["README.md"].decode()
    assert "trainer.extra.run\\_name | run of &lt;secret&gt; by &lt;secret&gt; |" in card
    assert "<secret>" in (planted / "runs/sft/recipe.yaml").read_text()
    for words in (
        ("status", "p.yaml"),
        ("status", "p.yaml", "--json"),
        ("runs", str(planted)),
        ("push", str(planted / "runs/sft"), "--repo-id", "me/b", "--base-model-id", "me/base"),
        ("push", str(planted / "runs/sft"), "--repo-id", "me/c", "--merged"),
        ("merge", str(planted / "runs/sft"), "--output", str(planted / "merged")),
    ):
        assert align(*words)[0] == 0, words


def test_no_command_before_a_run_shows_one(planted, align):
    for words in (
        ("validate", "p.yaml", "--json"),
        ("show", "p.yaml"),
        ("show", "p.yaml", "--json"),
        ("plan", "p.yaml"),
        ("plan", "p.yaml", "--json"),
        ("run", "p.yaml", "--dry-run"),
        ("recipes", "show", "p.yaml"),
        ("inspect", "p.yaml", "--stage", "sft", "--rows", "1"),
        ("inspect", "p.yaml", "--stage", "sft", "--rows", "1", "--json"),
    ):
        code, said = align(*words)
        assert code == 0, said


@pytest.mark.parametrize(
    "key",
    [
        "sft.trainer.extra.hub_token",
        "sft.hub_token",
        "sft.trainer.logging_steps",
        "sft.trainer.report_to",
        "sft.data.dataset_name",
        "sft.model.model_revision",
        "push.repo_id",
        "push.collection",
        "nothing.at.all",
    ],
)
@pytest.mark.parametrize("value", [RECIPE, WANDB, PASSWORD, f"https://u:{GIT}@h/x"])
def test_no_mistake_shows_one(planted, align, key, value):
    for command in (("validate", "p.yaml"), ("validate", "p.yaml", "--json"), ("show", "p.yaml")):
        align(*command, "--set", f"{key}={value}")


def test_a_token_in_the_recipe_is_refused_and_kept_nowhere(planted, hub, align):
    code, said = align("run", "p.yaml", "--set", f"sft.trainer.extra.hub_token={RECIPE}")
    assert code == 2
    assert "trainer.extra.hub_token: is decided by align" in said


def test_an_unexpected_error_of_a_push_shows_none(planted, hub, run, align, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError(f"bug with {CANARY}, {WANDB} and password={PASSWORD}")

    monkeypatch.setattr("align.hub.push._prepare", broken)
    code, said = align("push", str(run), "--repo-id", "me/model", "--base-model-id", "me/base")
    assert code == 1
    assert "bug with <secret>, <secret> and password=<secret>" in said
    logs = list((planted / "tmp").glob("align-*.log"))
    assert len(logs) == 1
    assert "RuntimeError" in logs[0].read_text()
