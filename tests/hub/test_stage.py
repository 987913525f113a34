"""A push at the end of a recipe: asked before anything runs, made after all is saved, tried again alone."""

import json
from pathlib import Path

import pytest
import yaml
from huggingface_hub import HfApi, constants
from local_hub import CANARY, Fault
from safetensors import safe_open

from align.cli import main
from align.config.load import load_pipeline, load_stage
from align.durable import read_json
from align.errors import AlignError
from align.lineage import identify
from align.pushes import push_complete

MODEL = "adapter_model.safetensors"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def base(hub, llama: Path) -> str:
    """The base, pushed to the Hub."""
    api = HfApi()
    api.create_repo("me/base", private=True)
    api.upload_folder(repo_id="me/base", folder_path=llama)
    hub.requests.clear()
    return "me/base"


@pytest.fixture
def sft(pipeline: Path, llama: Path) -> dict:
    """The recipe of a run of one step."""
    trainer = {"per_device_train_batch_size": 2, "max_steps": 1, "gradient_checkpointing": False}
    return {
        "stage": "sft",
        "model": {"model_name_or_path": str(llama)},
        "lora": {"lora_r": 4},
        "data": {"dataset_name": str(pipeline / "data")},
        "trainer": trainer,
    }


@pytest.fixture
def recipe(here, sft, base) -> Path:
    """A pipeline of a training, a push, and a stage behind the push."""
    push = {"stage": "push", "run": "$sft", "repo_id": "me/model", "base_model_id": base}
    best = {
        "stage": "sample",
        "model": sft["model"],
        "data": sft["data"] | {"dataset_train_split": "test"},
        "generation": {"num_generations": 2, "max_new_tokens": 2},
        "scorer": {"judge": "letters"},
        "pairs": {"only_finished": False},
    }
    stages = {"sft": sft, "push": push, "best": best}
    (here / "p.yaml").write_text(
        yaml.safe_dump({"output_dir": "runs", "stages": stages}, sort_keys=False)
    )
    return here / "p.yaml"


@pytest.fixture
def averaged(here, sft, base) -> Path:
    """A pipeline of two trainings, their average, and its push."""
    stages = {
        "one": sft,
        "two": sft | {"trainer": sft["trainer"] | {"seed": 7}},
        "mean": {"stage": "average", "models": {"one": "$one", "two": "$two"}},
        "push": {"stage": "push", "run": "$mean", "repo_id": "me/model", "base_model_id": base},
    }
    text = yaml.safe_dump({"output_dir": "runs", "stages": stages}, sort_keys=False)
    (here / "mean.yaml").write_text(text)
    return here / "mean.yaml"


@pytest.fixture
def alone(here, sft, base) -> Path:
    """A training whose own recipe asks for the push."""
    asked = {"output_dir": "one", "hub": {"repo_id": "me/model", "base_model_id": base}}
    (here / "sft.yaml").write_text(yaml.safe_dump(sft | asked))
    return here / "sft.yaml"


@pytest.fixture
def trained(monkeypatch) -> list[str]:
    """Names of the stages that trained, by the runs that were opened."""
    from align.runs import RunFolder

    found: list[str] = []
    opened = RunFolder._open

    def noted(folder, *given):
        found.append(folder.name)
        opened(folder, *given)

    monkeypatch.setattr(RunFolder, "_open", noted)
    return found


@pytest.fixture
def align(capfd):
    def call(*words: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as end:
            main(list(words))
        out, err = capfd.readouterr()
        said = " ".join(f"{out}\n{err}".split())
        assert CANARY not in said
        return end.value.code or 0, said

    return call


# --- before anything runs ---------------------------------------------------------------------


def other_weights(hub) -> None:
    HfApi().create_repo("me/model", private=True)
    hub.repos["me/model"].commit("main", {"model.safetensors": b"x"})


REFUSALS = {
    "no token": (lambda hub, patch: None, "not logged in"),
    "401": (lambda hub, patch: hub.faults.append(Fault("whoami", 401)), "the Hub answered 401"),
    "403": (
        lambda hub, patch: (
            HfApi().create_repo("me/model"),
            hub.faults.append(Fault("auth-check", 403)),
        ),
        "the Hub answered 403",
    ),
    "may only read": (lambda hub, patch: setattr(hub, "role", "read"), "may only read"),
    "made for another": (
        lambda hub, patch: setattr(
            hub, "scopes", [{"entity": {"name": "other"}, "permissions": ["repo.write"]}]
        ),
        "was not made to write to `me`",
    ),
    "public": (lambda hub, patch: HfApi().create_repo("me/model", private=False), "is a public"),
    "other weights": (lambda hub, patch: other_weights(hub), "already holds model.safetensors"),
    "no base": (lambda hub, patch: hub.repos.pop("me/base"), "base_model_id: me/base"),
}


@pytest.mark.parametrize("name", REFUSALS)
@pytest.mark.parametrize("form", ["pipeline", "stage"])
def test_what_would_be_refused_at_the_end_is_refused_at_the_start(
    hub, recipe, alone, align, trained, monkeypatch, here, name, form
):
    prepare, expected = REFUSALS[name]
    prepare(hub, monkeypatch)
    if name == "no token":
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(here / "none"))
    words = ("run", "p.yaml") if form == "pipeline" else ("sft", "--recipe", "sft.yaml")
    code, said = align(*words)
    assert code == 2
    assert expected in said
    assert trained == []
    assert not (here / "runs").exists()
    assert not (here / "one").exists()
    assert not (here / "one.partial").exists()


def test_an_owner_has_to_be_one_that_the_token_may_write_to(hub, recipe, align):
    for orgs, code, expected in (
        ({}, 2, "`org` is neither this account nor one of its organizations"),
        ({"org": "read"}, 2, "may only read in `org`"),
    ):
        hub.orgs = orgs
        for more in ((), ("--set", "push.pr=true")):  # a pull request, to what is not there
            found = align("run", "p.yaml", "--set", "push.repo_id=org/model", *more)
            assert found[0] == code
            assert expected in found[1]
    hub.orgs = {"org": "write"}
    hub.scopes = [{"entity": {"name": "org"}, "permissions": ["repo.write"]}]
    hub.faults.append(Fault("/commit/", 500))
    assert align("run", "p.yaml", "--set", "push.repo_id=org/model", "--until", "push")[0] == 1
    assert "org/model" in hub.repos


def test_a_collection_has_to_be_there(hub, recipe, align, trained):
    code, said = align("run", "p.yaml", "--set", "push.collection=me/none-1")
    assert code == 2
    assert "the collection me/none-1" in said
    assert trained == []


@pytest.mark.parametrize("how", [500, "timeout", "reset"])
def test_a_hub_that_cannot_be_asked_stops_before_anything_runs(
    hub, recipe, align, trained, monkeypatch, how
):
    monkeypatch.setattr("align.hub.account.TIMEOUT", 0.4 if how == "timeout" else 20.0)
    hub.faults.append(Fault("whoami", how, times=9))
    code, said = align("run", "p.yaml")
    assert code == 1
    assert "nothing has run yet" in said
    assert "HF_HUB_OFFLINE=1" in said
    assert trained == []


def test_offline_it_trains_and_pushes_once_there_is_a_network(
    hub, recipe, align, trained, monkeypatch
):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, said = align("run", "p.yaml")
    assert code == 1
    assert "nobody knows whether me/model can be pushed to" in said
    assert "not pushed: `push`; all else is done" in said
    assert trained == ["sft", "push", "best"]
    assert hub.requests == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert align("run", "p.yaml")[0] == 0
    assert trained == ["sft", "push", "best", "push"]
    assert MODEL in hub.files("me/model")


# --- when it fails, and the way on -------------------------------------------------------------


def test_a_failed_push_fails_alone_and_is_tried_again_alone(hub, recipe, align, trained):
    hub.faults.append(Fault("/commit/", 500, message=f"no, {CANARY}"))
    code, said = align("run", "p.yaml")
    assert code == 1
    assert "the Hub answered 500" in said
    assert "not pushed: `push`; all else is done" in said
    assert "align run p.yaml` tries that again" in said
    assert trained == ["sft", "push", "best"]
    assert "failed" in align("status", "p.yaml")[1]
    trained.clear()
    code, said = align("run", "p.yaml")
    assert (code, trained) == (0, ["push"])
    assert "sft: unchanged" in said
    record = read_json(Path("runs/push/artifact/push.json"))
    assert record["address"] == f"{hub.url}/me/model"
    assert record["commit"] == hub.repos["me/model"].branches["main"]
    assert record["files"][MODEL]["size"] == len(hub.files("me/model")[MODEL])
    hub.requests.clear()
    assert "nothing to do" in align("run", "p.yaml")[1]
    assert hub.requests == []


@pytest.mark.slow
def test_a_push_follows_what_it_pushes_and_what_the_card_says(hub, recipe, align, trained):
    """Another model is another push; and one that was there before is pushed again, since the Hub has the other."""
    assert align("run", "p.yaml", "--until", "push")[0] == 0
    first = hub.files("me/model")[MODEL]
    assert align("run", "p.yaml", "--until", "push", "--set", "sft.seed=7")[0] == 0
    assert hub.files("me/model")[MODEL] != first
    trained.clear()
    assert align("run", "p.yaml", "--until", "push")[0] == 0
    assert trained == ["push"]
    assert hub.files("me/model")[MODEL] == first


def test_an_average_at_the_end_of_a_pipeline_is_pushed(hub, averaged, align):
    code, said = align("plan", str(averaged))
    assert code == 0
    assert "to me/model (private)" in said
    assert "not known yet" not in said
    code, said = align("run", str(averaged))
    assert code == 0, said
    files = hub.files("me/model")
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "me/base"
    card = files["README.md"].decode()
    assert all(name in card for name in ("| one |", "| two |", "| mean |"))
    report = Path("runs/report.html").read_text(encoding="utf-8")
    assert "out of date" not in report
    assert "cannot be drawn" not in report
    assert "mean leads to push" in report
    code, said = align("report", "runs/mean")
    assert code == 0, said
    code, said = align("run", str(averaged))
    assert code == 0
    assert "nothing to do" in said


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["push.base_model_id=null"], "nobody else can load that"),
        (["push.base_model_id=null", "push.merged=true"], None),
        (["push.base_model_id=null", "mean.method=merge"], None),
        (["mean.models.one=$mean"], "refers to itself"),
    ],
)
def test_what_an_average_leaves_is_known_before_it_is_made(hub, averaged, overrides, expected):
    if expected is None:
        assert load_pipeline("mean.yaml", overrides, ready=False).config.stages
        return
    with pytest.raises(AlignError) as caught:
        load_pipeline("mean.yaml", overrides, ready=False)
    assert expected in str(caught.value)


def test_an_evaluation_is_part_of_a_push(run, tmp_path):
    config = load_stage(None, [f"run={run}", "repo_id=me/x", "output_dir=o"], stage="push").config
    before = identify(config).fingerprint
    inputs = identify(config).inputs
    assert {"run", "evaluation[eval]"} == set(inputs)
    file = run.parent / "eval" / "lineage.json"
    lineage = json.loads(file.read_text())
    lineage["outputs"]["artifact"] = "0" * 64
    file.write_text(json.dumps(lineage))
    assert identify(config).fingerprint != before


def test_a_training_pushes_itself_once_it_is_complete(hub, alone, align, trained):
    hub.faults.append(Fault("/commit/", 403))
    code, said = align("sft", "--recipe", "sft.yaml")
    assert code == 1
    assert "the same command tries again" in said
    assert Path("one/artifact/adapter_model.safetensors").is_file()
    assert trained == ["sft"]
    code, said = align("sft", "--recipe", "sft.yaml")
    assert (code, trained) == (0, ["sft"])
    assert "nothing to do" in said
    assert MODEL in hub.files("me/model")
    hub.requests.clear()
    assert "is on the Hub already: me/model" in align("sft", "--recipe", "sft.yaml")[1]
    assert hub.requests == []
    # Another place is another push, and no other training.
    assert align("sft", "--recipe", "sft.yaml", "--set", "hub.repo_id=me/second")[0] == 0
    assert trained == ["sft"]
    assert MODEL in hub.files("me/second")


@pytest.mark.slow
def test_in_a_pipeline_a_stage_pushes_itself_too(hub, recipe, align, trained):
    own = ("--set", "sft.hub.repo_id=me/own", "--set", "sft.hub.base_model_id=me/base")
    hub.faults.append(Fault("me/own/commit/", 500))
    code, said = align("run", "p.yaml", *own)
    assert code == 1
    assert "not pushed: `sft`" in said
    assert trained == ["sft", "push", "best"]
    assert "not pushed to me/own yet" in align("status", "p.yaml", *own)[1]
    assert align("run", "p.yaml", *own)[0] == 0
    assert trained == ["sft", "push", "best"]
    assert MODEL in hub.files("me/own")


def test_only_one_process_pushes(hub, alone, run, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    push_complete(load_stage("sft.yaml").config, run, "sft")
    assert not [line for line in hub.requests if "commit" in line]


def test_the_stage_by_itself(hub, base, run, align, trained):
    text = yaml.safe_dump(
        {"stage": "push", "output_dir": "pushed", "run": str(run), "hub": {"repo_id": "me/model"}}
    )
    Path("push.yaml").write_text(text)
    words = ("push", "--recipe", "push.yaml", "--base-model-id", base)
    assert align(*words, "--dry-run")[0] == 0
    assert trained == []
    assert align(*words)[0] == 0
    assert trained == ["push"]
    assert "nothing to do" in align(*words)[1]
    other = ("--repo-id", "me/other", "--output-dir", "elsewhere")
    assert (
        align("push", str(run / "artifact"), "-r", "push.yaml", "--base-model-id", base, *other)[0]
        == 0
    )
    assert MODEL in hub.files("me/other")


@pytest.mark.parametrize(("name", "kind"), [("float16", "F16"), ("bfloat16", "BF16")])
def test_merged_weights_have_the_type_that_was_asked_for(hub, run, align, tmp_path, name, kind):
    code, _ = align("push", str(run), "--repo-id", "me/m", "--merged", "--merged-dtype", name)
    assert code == 0
    file = tmp_path / "model.safetensors"
    sent = hub.files("me/m")
    file.write_bytes(sent["model.safetensors"])
    with safe_open(file, "pt") as weights:
        assert {weights.get_slice(key).get_dtype() for key in weights.keys()} == {kind}  # noqa: SIM118
    report, card = json.loads(sent["merge_report.json"]), sent["README.md"].decode()
    assert report["dtype"] == name
    assert f"saved in {name}" in card
    assert f"{report['kl_mean']:.2e} nats per token" in card
    assert f"{report['greedy_agreement']:.2%}" in card


# --- recipes ----------------------------------------------------------------------------------


def told(*overrides: str) -> str:
    with pytest.raises(AlignError) as caught:
        load_pipeline("p.yaml", overrides, ready=False)
    return str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["push.repo_id=model"], "is no id of the Hub"),
        (["push.repo_id=null"], "is required"),
        (["push.base_model_id=null"], "nobody else can load that"),
        (["push.base_model_id=x"], "ORG/NAME[@REVISION]"),
        (["push.pr=true", "push.revision=v1"], "a pull request is against main"),
        (["push.merged_dtype=float16"], "nothing is merged"),
        (["push.run=$sft/x.json"], "needs a model folder"),
        (["best.model.model_name_or_path=$push"], "holds the record of a push"),
        (["best.public=true"], "no key of `sample`"),
        (["push.launch.num_processes=2"], "a push is one"),
        (["sft.hub.public=true"], "nothing is pushed"),
        (["sft.revision=v1"], "model.model_revision"),
        (["sft.push_to_hub=true"], "`hub.repo_id: ORG/NAME` pushes the complete run"),
        (["sft.trainer.hub_model_id=me/x"], "did you mean `hub.repo_id`?"),
        (["sft.hub_token=x"], "a token has no place in a recipe"),
        (["sft.repo_id=me/model", "sft.base_model_id=me/b"], "would replace the other"),
        (["best.data.dataset_name=$push/x.jsonl"], "leaves a record"),
    ],
)
def test_mistakes_are_told_without_a_network(hub, recipe, overrides, expected):
    hub.requests.clear()
    assert expected in told(*overrides)
    assert hub.requests == []


def test_the_licence_of_llama_is_known_before_there_is_a_model(hub, recipe, monkeypatch):
    llama = ["sft.model_name_or_path=meta-llama/Llama-3.1-8B", "push.public=true"]
    assert "as in `me/Llama-model`" in told(*llama)
    load_pipeline("p.yaml", [*llama, "push.repo_id=me/Llama-x"], ready=False)


def test_where_it_goes_is_no_part_of_a_trained_model(alone):
    one = load_stage("sft.yaml").config
    two = load_stage("sft.yaml", ["hub.repo_id=me/other"]).config
    none = load_stage("sft.yaml", ["hub.repo_id=null", "hub.base_model_id=null"]).config
    assert identify(one).fingerprint == identify(two).fingerprint == identify(none).fingerprint


def test_trls_name_for_the_repository_is_ours(alone):
    loaded = load_stage("sft.yaml", ["hub_model_id=me/theirs"])
    assert loaded.config.hub.repo_id == "me/theirs"
    assert any("hub.repo_id" in note for note in loaded.notes)


def test_a_plan_says_what_is_pushed(recipe, align, hub):
    hub.requests.clear()
    code, said = align("plan", "p.yaml")
    assert code == 0
    assert "kB to me/model (private)" in said
    code, said = align("plan", "p.yaml", "--set", "push.merged=true")
    assert "merging takes" in said
    code, said = align(
        "plan", "p.yaml", "--set", "sft.repo_id=me/own", "--set", "sft.merged=true", "--json"
    )
    assert "to me/own (private)" in said
    assert hub.requests == []


def test_a_plan_of_a_run_that_is_there_counts_its_files(run, align):
    Path("push.yaml").write_text(
        yaml.safe_dump({"stage": "push", "output_dir": "o", "run": str(run), "repo_id": "me/x"})
    )
    sizes = [
        facts["size"] for facts in read_json(run / "lineage.json")["outputs"]["files"].values()
    ]
    from align.report.progress import size

    assert f"{size(sum(sizes))} to me/x" in align("plan", "push.yaml")[1]


@pytest.mark.slow
def test_processes_of_a_pipeline_do_not_push_and_the_pipeline_does(
    hub, recipe, align, trained, monkeypatch
):
    from align.runs import run_stage

    def relaunch(words, launch):
        config = load_stage(words[2]).config
        assert config.hub.repo_id is None
        run_stage(config.model_copy(update={"launch": type(launch)()}))
        assert "me/own" not in hub.repos
        return 0

    monkeypatch.setattr("align.pipeline.relaunch", relaunch)
    own = ("--set", "sft.hub.repo_id=me/own", "--set", "sft.hub.base_model_id=me/base")
    several = ("--set", "sft.launch.num_processes=2", "--until", "sft")
    assert align("run", "p.yaml", *own, *several)[0] == 0
    assert trained == ["sft"]
    assert MODEL in hub.files("me/own")
    assert read_json(Path("runs/sft/pushed.json"))["repo_id"] == "me/own"
