"""`align push` with the real client against a Hub on this machine, whole and in every way broken."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, constants
from local_hub import CANARY, Fault

from align.cli import main
from align.lineage import file_digests
from align.runs import run_stage
from align.stages.average import AverageConfig

ADAPTER_FILES = {
    *("README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja"),
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json"),
}


@pytest.fixture
def base(hub, llama: Path) -> str:
    """The base, pushed to the Hub."""
    api = HfApi()
    api.create_repo("me/base", private=True)
    api.upload_folder(repo_id="me/base", folder_path=llama)
    return "me/base"


def push(run: Path, *words: str, repo: str = "me/model") -> int:
    with pytest.raises(SystemExit) as end:
        main(["push", str(run), "--repo-id", repo, *words])
    return end.value.code or 0


def own(hub, repo: str = "me/model", branch: str = "main") -> dict[str, bytes]:
    return {k: v for k, v in hub.files(repo, branch).items() if not k.startswith(".")}


def leaks(*places: Path) -> list[Path]:
    return [
        path
        for place in places
        for path in place.rglob("*")
        if path.is_file() and CANARY.encode() in path.read_bytes()
    ]


def test_an_adapter_is_pushed_with_all_that_belongs_to_it(hub, base, run, capfd):
    before = file_digests(run)
    assert push(run, "--base-model-id", base) == 0
    sent = own(hub)
    assert set(sent) == ADAPTER_FILES
    assert hub.repos["me/model"].private
    weights = "adapter_model.safetensors"
    assert sent[weights] == (run / "artifact" / weights).read_bytes()
    config = json.loads(sent["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == ("me/base", None)
    assert file_digests(run) == before
    assert not (run / ".push").exists()
    out, err = capfd.readouterr()
    assert out.index(weights) < out.index(f"pushed: {hub.url}/me/model")
    assert "telemetry" not in " ".join(hub.requests)
    here = (str(run.parent), str(Path.home()), "/tmp/")
    for name, content in sent.items():
        assert not any(place.encode() in content for place in here), name
    assert CANARY not in out + err
    assert not leaks(run.parent)


FAULTS = {
    "401": Fault("whoami", 401, message=f"Bad token {CANARY}"),
    "403 repository": Fault("repos/create", 403),
    "403 commit": Fault("/commit/", 403, message="you may not write here"),
    "409 commit": Fault("/commit/", 409, message="somebody was quicker"),
    "500 preupload": Fault("/preupload/", 500, times=9),
    "500 upload": Fault("PUT /lfs/", 500, times=9),
    "500 commit": Fault("/commit/", 500),
    "time-out upload": Fault("PUT /lfs/", "timeout", times=9),
    "time-out commit": Fault("/commit/", "timeout"),
    "reset upload": Fault("PUT /lfs/", "reset", times=9),
    "reset batch": Fault("objects/batch", "reset", times=9),
    "lost commit": Fault("/commit/", "lost"),
    "500 check": Fault("/paths-info/", 500),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_failure_says_what_happened_and_the_same_command_goes_on(
    hub, base, run, capfd, monkeypatch, name
):
    fault = replace(FAULTS[name])
    hub.faults.append(fault)
    before = file_digests(run)
    words = ("--base-model-id", base)
    with monkeypatch.context() as patch:
        if fault.how == "timeout":
            patch.setattr("align.hub.account.TIMEOUT", 0.4)
        assert push(run, *words) == 1
    out, err = capfd.readouterr()
    said = " ".join(err.split())
    assert f"align push {run} --repo-id me/model --base-model-id me/base" in said
    if fault.how == "timeout":
        assert "timed out" in said
    elif isinstance(fault.how, int):
        assert f"the Hub answered {fault.how}" in said
    assert "pushed:" not in out
    assert CANARY not in out + err
    assert "Signature" not in out + err
    assert not leaks(run.parent)
    assert file_digests(run) == before
    hub.faults.clear()
    assert push(run, *words) == 0
    assert set(own(hub)) == ADAPTER_FILES
    assert file_digests(run) == before
    assert not leaks(run.parent)


def test_a_short_disturbance_is_nobodys_business(hub, base, run):
    hub.faults += [Fault("PUT /lfs/", "reset", times=2), Fault("/preupload/", 503, times=2)]
    assert push(run, "--base-model-id", base) == 0
    assert set(own(hub)) == ADAPTER_FILES


def test_what_the_hub_holds_already_is_not_sent_again(hub, base, run):
    hub.faults.append(Fault("/commit/", 500))
    assert push(run, "--base-model-id", base) == 1
    hub.requests.clear()
    assert push(run, "--base-model-id", base) == 0
    assert not [line for line in hub.requests if line.startswith("PUT")]


def test_large_files_go_in_parts(hub, base, run, monkeypatch):
    monkeypatch.setattr(hub, "multipart", True)
    hub.faults.append(Fault("PUT /part/.*/1", "reset", times=1))
    assert push(run, "--base-model-id", base) == 0
    assert set(own(hub)) == ADAPTER_FILES
    assert any("PUT /part/" in line for line in hub.requests)


def test_an_upload_that_arrives_damaged_is_no_success(hub, base, run, capfd):
    hub.corrupt = True
    assert push(run, "--base-model-id", base) == 1
    assert "another content after the upload" in " ".join(capfd.readouterr().err.split())


def test_the_xet_way_fails_aloud_too(hub, base, run, capfd, monkeypatch):
    """This Hub has no Xet store; with hf_xet installed the client asks for it."""
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    assert push(run, "--base-model-id", base) == 1
    out, err = capfd.readouterr()
    assert "nothing is lost" in err
    assert CANARY not in out + err
    assert own(hub) == {}
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    assert push(run, "--base-model-id", base) == 0


def test_branch_pull_request_and_collection(hub, base, run, capfd):
    words = ("--base-model-id", base)
    assert push(run, *words, "--revision", "v1", "--collection", "me/best-123") == 0
    assert set(own(hub, branch="v1")) == ADAPTER_FILES
    assert set(own(hub)) == set()
    assert hub.collections == {"me/best-123": ["me/model"]}
    assert push(run, *words, "--pr") == 0
    assert set(own(hub, branch="refs/pr/1")) == ADAPTER_FILES
    assert "/me/model/discussions/1" in capfd.readouterr().out
    hub.faults.append(Fault("collections", 403))
    assert push(run, *words, "--collection", "other/list") == 1
    assert "the model is uploaded" in " ".join(capfd.readouterr().err.split())


def test_without_a_token_that_may_write_nothing_is_sent(hub, run, monkeypatch, capfd):
    hub.role = "read"
    assert push(run, "--base-model-id", "me/base") == 2
    assert "may only read" in capfd.readouterr().err
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(run / "no-token"))
    assert push(run, "--base-model-id", "me/base") == 2
    assert "not logged in" in capfd.readouterr().err
    assert hub.requests == ["GET /api/whoami-v2"]


def test_a_dry_run_asks_nobody(hub, run, capfd):
    before = file_digests(run.parent)
    assert push(run, "--base-model-id", "me/base", "--dry-run") == 0
    assert push(run, "--merged", "--dry-run") == 0
    assert hub.requests == []
    assert file_digests(run.parent) == before
    out = capfd.readouterr().out
    assert all(name in out for name in ADAPTER_FILES)


@pytest.mark.parametrize("name", ["optimizer.pt", "training_args.bin", "rows.jsonl", "a/b.json"])
def test_what_is_no_part_of_a_model_stays_here(hub, run, capfd, name):
    file = run / "artifact" / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("x")
    assert push(run, "--base-model-id", "me/base") == 2
    assert name.split("/")[0] in capfd.readouterr().err
    assert hub.repos == {}


def test_weights_have_to_be_safetensors(hub, run, capfd):
    weights = run / "artifact" / "model.safetensors"
    weights.write_bytes(b"\x80\x04pickle")
    assert push(run, "--base-model-id", "me/base") == 2
    assert "no safetensors" in capfd.readouterr().err


def test_a_run_with_other_files_than_it_wrote_is_refused(hub, run, capfd):
    weights = run / "artifact" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert push(run, "--base-model-id", "me/base") == 2
    assert "damaged" in capfd.readouterr().err


def test_the_base_has_to_be_one_that_others_can_load(hub, run, make_llama, capfd):
    assert push(run) == 2
    assert "--base-model-id" in capfd.readouterr().err
    assert push(run, "--base-model-id", "me/nowhere") == 2
    assert "not on the Hub" in capfd.readouterr().err
    api = HfApi()
    api.create_repo("me/other")
    api.upload_folder(repo_id="me/other", folder_path=make_llama(8))
    assert push(run, "--base-model-id", "me/other") == 2
    assert "other weights" in capfd.readouterr().err
    assert "me/model" not in hub.repos


def test_a_public_repository_gets_nothing_by_accident(hub, base, run, capfd):
    HfApi().create_repo("me/model", private=False)
    assert push(run, "--base-model-id", base) == 2
    assert "public" in capfd.readouterr().err
    assert own(hub) == {}
    assert push(run, "--base-model-id", base, "--public") == 0


def test_weights_of_two_models_never_lie_side_by_side(hub, base, run, capfd):
    assert push(run, "--base-model-id", base, repo="me/base") == 2
    assert "model.safetensors" in capfd.readouterr().err


def test_a_secret_in_a_file_is_not_sent(hub, base, run, capfd):
    config = run / "artifact" / "generation_config.json"
    lineage = json.loads((run / "lineage.json").read_text())
    config.write_text(json.dumps({"note": "hf_" + "A" * 30}))
    from align.lineage import file_sha256

    lineage["outputs"]["files"][config.name]["sha256"] = file_sha256(config)
    (run / "lineage.json").write_text(json.dumps(lineage))
    assert push(run, "--base-model-id", base) == 2
    assert "access token" in capfd.readouterr().err
    assert "me/model" not in hub.repos


def test_merged_weights_are_merged_once(hub, run, monkeypatch):
    from align.models import merging

    hub.faults.append(Fault("/commit/", 500))
    assert push(run, "--merged") == 1
    monkeypatch.setattr(merging, "merge", None)
    assert push(run, "--merged") == 0
    sent = set(own(hub))
    assert {"model.safetensors", "config.json", "merge_report.json", "README.md"} < sent
    assert "adapter_config.json" not in sent


@pytest.mark.parametrize(
    ("method", "words", "sent"),
    [
        ("cat", ["--base-model-id", "me/base"], "adapter_model.safetensors"),
        ("cat", ["--merged"], "merge_report.json"),
        ("merge", [], "model.safetensors"),
    ],
)
def test_an_average_is_pushed_like_any_model(hub, base, run, method, words, sent):
    """As an adapter, merged with a proof on its first member's rows, and as full weights."""
    from align.models.source import find_model

    both = {name: str(run / "artifact") for name in ("a", "b")}
    given = {"output_dir": str(run.parent / "mean"), "models": both, "method": method}
    mean = run_stage(AverageConfig.model_validate(given), quiet=True)
    assert push(mean, *words) == 0
    held = own(hub)
    assert sent in held
    assert ("adapter_config.json" in held) == (sent == "adapter_model.safetensors")
    assert "average_report.json" not in held
    card = held["README.md"].decode()
    assert "an average of weights" in card
    assert "text-generation" in card
    assert str(run.parent) not in card
    assert "supervised fine-tuning" in card  # the stages it was made of
    assert find_model(str(mean)).recipe["stage"] == "sft"


def test_an_average_of_reward_models_is_one(hub, base, reward, tmp_path):
    both = {name: str(reward / "artifact") for name in ("a", "b")}
    given = {"output_dir": str(tmp_path / "mean"), "models": both}
    mean = run_stage(AverageConfig.model_validate(given), quiet=True)
    assert push(mean, "--base-model-id", base) == 0
    card = own(hub)["README.md"].decode()
    assert "pipeline_tag: text-classification" in card
    assert "AutoPeftModelForSequenceClassification" in card


def test_a_model_made_of_llama_is_named_and_labelled_so(hub, run, llama, capfd):
    name = "meta-llama/Llama-3.1-8B"
    HfApi().create_repo(name)
    HfApi().upload_folder(repo_id=name, folder_path=llama)
    words = ("--base-model-id", name, "--public")
    assert push(run, *words) == 2
    assert "me/Llama-model" in capfd.readouterr().err
    assert push(run, *words, repo="me/Llama-3.1-model") == 0
    sent = own(hub, "me/Llama-3.1-model")
    assert not hub.repos["me/Llama-3.1-model"].private
    assert sent["NOTICE"].startswith(b"Llama 3.1 is licensed under")
    assert b"**Built with Llama**" in sent["README.md"]


def test_a_licence_that_lies_with_the_base_goes_along(run, tmp_path):
    from align.hub.facts import read_run
    from align.hub.files import licence_files

    base = tmp_path / "base"
    base.mkdir()
    (base / "LICENSE").write_text("the agreement")
    found = licence_files(replace(read_run(run), base=str(base)))
    assert found == {"LICENSE": "the agreement"}


def outside(hub, home: Path) -> dict[str, str]:
    """The environment of a process of its own that talks to the local Hub."""
    return {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "NO_COLOR": "1",
    }


def test_as_a_command_it_needs_no_torch_and_calls_nobody_else(hub, base, run, tmp_path):
    hub.requests.clear()
    hub.faults.append(Fault("/commit/", 403, message=f"denied for {CANARY}"))
    code = "import sys; from align.cli import main\ntry:\n    main()\nfinally:\n    assert 'torch' not in sys.modules"
    words = ["push", str(run), "--repo-id", "me/model", "--base-model-id", base]
    environment = outside(hub, tmp_path / "home")
    del environment["HF_HUB_DISABLE_TELEMETRY"]  # the command itself turns it off
    for expected in (1, 0):
        done = subprocess.run(
            [sys.executable, "-c", code, *words], env=environment, capture_output=True, text=True
        )
        assert done.returncode == expected, done.stderr
        assert CANARY not in done.stdout + done.stderr
    known = ("whoami", "repos/create", "/api/models/", "validate-yaml", "/lfs/", "/verify/")
    assert not [line for line in hub.requests if not any(word in line for word in known)]
    assert not leaks(tmp_path)


LOAD = """
import sys, torch
from transformers import AutoTokenizer, AutoModelForCausalLM
repo, kind, out = sys.argv[1:]
if kind == "adapter":
    from peft import AutoPeftModelForCausalLM as Loader
else:
    Loader = AutoModelForCausalLM
model = Loader.from_pretrained(repo, dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(repo)
assert tokenizer.chat_template
ids = tokenizer("Count to 5.", return_tensors="pt").input_ids
with torch.no_grad():
    torch.save(model(ids).logits, out)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adapter", "merged", "full"])
def test_what_was_pushed_loads_from_the_hub_with_the_same_logits(
    hub, base, run, pipeline, tmp_path, kind
):
    from align.models.loading import load_any_policy

    words = {"adapter": ("--base-model-id", base), "merged": ("--merged",), "full": ()}[kind]
    if kind == "full":
        run = shutil.copytree(pipeline / "full", tmp_path / "full")
    assert push(run, *words) == 0
    environment = outside(hub, tmp_path / "home")
    out = tmp_path / "logits.pt"
    subprocess.run(
        [sys.executable, "-c", LOAD, "me/model", kind, str(out)], env=environment, check=True
    )
    model, tokenizer = load_any_policy(str(run / "artifact"))
    with torch.no_grad():
        expected = model(tokenizer("Count to 5.", return_tensors="pt").input_ids).logits
    found = torch.load(out, weights_only=True)
    if kind == "merged":  # rounded to bfloat16
        kl = (expected.softmax(-1) * (expected.log_softmax(-1) - found.log_softmax(-1))).sum(-1)
        assert kl.mean() < 1e-3
        report = json.loads(own(hub)["merge_report.json"])
        assert f"{report['kl_mean']:.2e}" in own(hub)["README.md"].decode()
    else:
        assert torch.equal(found, expected)


BY_ITS_CARD = """
import re, sys, torch
from huggingface_hub import hf_hub_download
repo, out = sys.argv[1:]
card = open(hf_hub_download(repo, "README.md"), encoding="utf-8").read()
exec(re.search(r"```python\\n(.*?)```", card, re.S)[1])
model = chat.model if "chat" in globals() else model
tokenizer = chat.tokenizer if "chat" in globals() else tokenizer
with torch.no_grad():
    torch.save(model.eval()(tokenizer("Count to 5.", return_tensors="pt").input_ids).logits, out)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adapter", "full", "reward"])
def test_the_lines_of_the_card_load_what_a_second_try_has_pushed(
    hub, base, run, reward, pipeline, tmp_path, kind
):
    """Reset in the middle of the upload; then the same command, and the card's own way to load it."""
    from align.models.loading import load_any_policy, load_reward_model

    run = {"adapter": run, "full": pipeline / "full", "reward": reward}[kind]
    run = shutil.copytree(run, tmp_path / "copy" / kind)
    words = () if kind == "full" else ("--base-model-id", base)
    hub.objects.clear()
    hub.faults.append(Fault("PUT /lfs/", "reset", times=9))
    assert push(run, *words) == 1
    assert own(hub) == {}
    hub.faults.clear()
    assert push(run, *words) == 0
    out = tmp_path / "logits.pt"
    subprocess.run(
        [sys.executable, "-c", BY_ITS_CARD, "me/model", str(out)],
        env=outside(hub, tmp_path / "home"),
        check=True,
    )
    if kind == "reward":
        model, tokenizer = load_reward_model(str(run / "artifact"))
    else:
        model, tokenizer = load_any_policy(str(run / "artifact"))
    with torch.no_grad():
        ids = tokenizer("Count to 5.", return_tensors="pt").input_ids
        expected = model.eval()(ids).logits
    assert torch.equal(torch.load(out, weights_only=True), expected)
