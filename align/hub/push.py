"""`align push`: a complete run onto the Hub. The run itself is only read.

What is sent lies in `<run>/.push/` until the Hub has it, so that a failed push goes on where it
was: weights that the Hub already holds are not sent twice, merged weights are not merged again.
"""

import json
import shlex
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.config.sections import HubSection
from align.durable import read_json, write_json
from align.errors import AlignError, NotPushed, fail
from align.hub import files
from align.hub.account import answers, check_account, client
from align.hub.facts import RunFacts, is_local, read_run
from align.hub.licences import Licence, llama_licence
from align.lineage import file_digests, file_sha256
from align.locks import locked
from align.pushes import PUSHED, is_pushed
from align.report.progress import size
from align.report.terminal import say
from align.resources import display
from align.stopping import Stopped, stoppable

if TYPE_CHECKING:
    from align.models.merging import Dtype


@dataclass(frozen=True)
class Push:
    """What is to be pushed, and where."""

    run: Path
    hub: HubSection
    again: str | None = None
    """The command that tries again, where it is not the one that runs."""

    @classmethod
    def of(cls, run: Path, hub: HubSection, *, again: str | None = None) -> "Push":
        """The push of a run folder, which may be named by its artifact."""
        run = run.expanduser().absolute()
        inside = run.name == "artifact" and (run.parent / "lineage.json").is_file()
        return cls(run.parent if inside else run, hub, again)

    @property
    def repo_id(self) -> str:
        return str(self.hub.repo_id)

    @property
    def command(self) -> str:
        """The command line that does this push (again)."""
        words = ["align", "push", display(self.run), "--repo-id", self.repo_id]
        given = HubSection(repo_id=self.repo_id).model_dump()
        for name, value in self.hub.model_dump().items():
            flag = f"--{name.replace('_', '-')}"
            if value != given[name]:
                words += [flag] if value is True else [flag, str(value)]
        return shlex.join(words)

    @property
    def way_on(self) -> str:
        """What to do after a failure."""
        if self.again is not None:
            return f"nothing is lost, {self.again}"
        return f"nothing is lost, try again: {self.command}"


@dataclass(frozen=True)
class Pushed:
    """What the Hub holds now."""

    repo_id: str
    address: str
    commit: str
    files: Mapping[str, Mapping[str, Any]]
    """Name -> size in bytes and sha256, as they were checked after the upload."""

    @property
    def size(self) -> int:
        """Bytes in all."""
        return sum(int(facts["size"]) for facts in self.files.values())

    def record(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {
            "repo_id": self.repo_id,
            "address": self.address,
            "commit": self.commit,
            "files": {name: dict(facts) for name, facts in self.files.items()},
        }


def push(asked: Push) -> Pushed:
    """Upload a run's model with its tokenizer, settings and card.

    The token is huggingface_hub's own (`hf auth login`, HF_TOKEN), and is checked first. All files
    go in one commit, and what the Hub then says it holds is compared with what was sent.

    Raises:
        NotPushed: something to mend. `HubFailure`: what the Hub answered, and the way on.
    """
    try:
        return _push(asked)
    except (NotPushed, Stopped):
        raise
    except AlignError as error:
        raise NotPushed.of(error) from None


def _push(asked: Push) -> Pushed:
    _check(asked)
    with stoppable(), client() as api:
        check_account(api, asked.hub, asked.way_on)
        run = read_run(asked.run, samples=asked.hub.samples)
        home = run.folder / ".push"
        with locked(home):
            folder = home / "files"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            base = _prepare(asked, run, folder, merge_now=True)
            _check_hub_base(asked, api, run, base)
            _show(asked, folder)
            done = _send(asked, api, folder)
            shutil.rmtree(home)
    say(f"pushed: {done.address}", results=True)
    return done


def list_files(asked: Push) -> None:
    """Say what a push would send, and ask nobody.

    Raises:
        AlignError: something to mend before it could be sent.
    """
    _check(asked)
    run = read_run(asked.run, samples=asked.hub.samples)
    with tempfile.TemporaryDirectory(prefix="align-push-") as scratch:
        _prepare(asked, run, Path(scratch), merge_now=False)
        _show(asked, Path(scratch))
        if _merges(asked, run):
            say("          merged weights, made when pushed", results=True)


def _check(asked: Push) -> None:
    files.check_repo_id(asked.repo_id)
    if asked.hub.pr and asked.hub.revision:
        fail("a pull request is against main", where="--revision", hint="leave --pr or it out")


def push_once(run: Path, hub: HubSection, *, name: str) -> None:
    """Push a complete run as its own recipe asks, unless that very push was made already.

    Raises:
        NotPushed: it did not come about; the run is complete, and the same command tries again.
    """
    if is_pushed(run, hub):
        say(f"{name}: is on the Hub already: {hub.repo_id}")
        return
    done = push(Push.of(run, hub, again="the same command tries again"))
    lineage = json.loads((run / "lineage.json").read_text(encoding="utf-8"))
    mark = {"asked": hub.model_dump(), "artifact": lineage["outputs"]["artifact"]}
    write_json(run / PUSHED, mark | done.record())


# --- before anything is sent ----------------------------------------------------------------


def _merges(asked: Push, run: RunFacts) -> bool:
    return asked.hub.merged and run.base is not None


def _prepare(asked: Push, run: RunFacts, folder: Path, *, merge_now: bool) -> files.Base | None:
    """Fill the folder that is sent, card included; returns the base that it names."""
    from align.hub.card import Upload, model_card

    artifact = run.artifact
    if not (artifact / "config.json").is_file() and run.base is None:
        fail(
            f"a run of `{run.stage.kind}` holds no model",
            where=str(run.folder),
            hint="push a run of sft, reward, dpo, ppo or average",
        )
    files.check_allowed(artifact)
    files.check_own_base(run)
    merges = _merges(asked, run)
    base = files.public_base(run, asked.hub.base_model_id, adapter=not merges)
    licence = _licence(asked, run, base)
    model = _merged(run, asked.hub.merged_dtype) if merges and merge_now else artifact
    texts = files.licence_files(run) if licence else {}
    upload = Upload(
        asked.repo_id,
        base.id if base else None,
        base.revision if base else None,
        adapter=run.base is not None and not merges,
        reward=run.scores,
        licence=licence,
        licence_file=any(name.startswith("LICENSE") for name in texts),
        merge=read_json(model / "merge_report.json"),
    )
    extra = texts | ({"NOTICE": licence.notice} if licence else {})
    extra["README.md"] = str(model_card(run, upload))
    if merges and not merge_now:
        (folder / "README.md").write_text(extra["README.md"], encoding="utf-8")
    else:
        files.fill(folder, model, base, run, extra)
    return base


def _licence(asked: Push, run: RunFacts, base: files.Base | None) -> Licence | None:
    names = [Path(name).name if is_local(name) else name for name in (run.base or "", *run.roots)]
    licence = llama_licence([base.id if base else "", *names], run.model_config)
    name = asked.repo_id.rpartition("/")[2]
    if licence and not licence.allows(name):
        owner = asked.repo_id.partition("/")[0]
        better = f"{owner}/{licence.prefix.replace(' ', '-')}-{name}"
        message = f"Llama's licence asks that the name begin with `{licence.prefix}`"
        if asked.hub.public:
            fail(message, where=f"--repo-id {asked.repo_id}", hint=f"as in `{better}`")
        say(f"note: {message} once others get the model, as in `{better}`")
    return licence


def _merged(run: RunFacts, dtype: "Dtype") -> Path:
    """Merged weights in the run's own working folder; those of a push that failed are taken."""
    from align.models.merging import REPORT, merge

    folder = run.folder / ".push" / "merged"
    weights = run.artifact / "adapter_model.safetensors"
    kept = read_json(folder / REPORT) or {}
    same = kept.get("adapter_sha256") == file_sha256(weights) and "merged_into" in kept
    if same and kept.get("dtype") == dtype:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    say("merging the adapter into its base")
    merge(str(run.folder), folder, dtype=dtype)
    return folder


def _check_hub_base(asked: Push, api: Any, run: RunFacts, base: files.Base | None) -> None:
    """Refuse a base on the Hub that is not there, or that holds other weights than the local one."""
    if base is None or run.base is None or not is_local(run.base):
        return
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

    with answers(asked.repo_id, f"looking at {base.id}", asked.way_on):
        try:
            info = api.model_info(base.id, revision=base.revision, files_metadata=True)
        except GatedRepoError:
            return
        except HfHubHTTPError as error:
            if error.response.status_code in (401, 404):
                fail(
                    "is not on the Hub, or this token may not see it",
                    where=f"--base-model-id {base.id}",
                    hint="push the base first",
                )
            raise
    there = {item.rfilename: item.lfs.sha256 for item in info.siblings if item.lfs}
    here = file_digests(Path(run.base).expanduser(), "*.safetensors")
    other = [name for name in here if name in there and there[name] != here[name]]
    if other:
        fail(
            f"holds other weights than the base of this adapter ({other[0]} differs)",
            where=f"--base-model-id {base.id}",
            hint=f"name the Hub's copy of {run.base}, or push full weights with --merged",
        )


def _show(asked: Push, folder: Path) -> None:
    """What will be sent, with sizes."""
    found = sorted(folder.iterdir(), key=lambda path: path.name)
    total = sum(path.stat().st_size for path in found)
    who = "public" if asked.hub.public else "private"
    where = "a pull request" if asked.hub.pr else asked.hub.revision or "main"
    head = f"{size(total)} in {len(found)} files to {asked.repo_id} ({where}, {who}):"
    say(head, results=True)
    for path in found:
        say(f"  {size(path.stat().st_size):>9}  {path.name}", results=True)


# --- sending --------------------------------------------------------------------------------


def _send(asked: Push, api: Any, folder: Path) -> Pushed:
    """One commit with all files, checked against what the Hub then holds."""
    from huggingface_hub import CommitOperationAdd

    hub, repo = asked.hub, asked.repo_id
    with answers(repo, "making the repository", asked.way_on):
        api.create_repo(repo, private=not hub.public, exist_ok=True)
        private = api.model_info(repo).private
    if not hub.public and not private:
        fail(
            "is a public repository",
            where=f"--repo-id {repo}",
            hint="say --public if everybody may see this model, or name another repository",
        )
    if hub.public and private:
        say(f"note: {repo} is private and stays so until you change that in its settings")
    with answers(repo, "uploading", asked.way_on):
        if hub.revision:
            api.create_branch(repo, branch=hub.revision, exist_ok=True)
        _check_mixture(asked, api, folder)
        sent = sorted(folder.iterdir())
        commit = api.create_commit(
            repo,
            [CommitOperationAdd(path.name, str(path)) for path in sent],
            commit_message="Model and card, by align",
            revision=hub.revision,
            create_pr=hub.pr,
        )
        held = _verify(api, repo, commit.oid, sent)
    if hub.collection:
        with answers(repo, "the model is uploaded; adding it to the collection", asked.way_on):
            api.add_collection_item(hub.collection, repo, "model", exists_ok=True)
    return Pushed(repo, str(commit.pr_url or f"{api.endpoint}/{repo}"), commit.oid, held)


def _check_mixture(asked: Push, api: Any, folder: Path) -> None:
    """Refuse a repository in which other weights would lie beside ours: which are loaded then?"""
    there = api.list_repo_files(asked.repo_id, revision=asked.hub.revision)
    other = [name for name in there if files.is_weights(name) and not (folder / name).exists()]
    if other:
        fail(
            f"already holds {other[0]}, which is no part of this push",
            where=f"--repo-id {asked.repo_id}",
            hint="name another repository, or a branch of its own with --revision",
        )


def _verify(api: Any, repo: str, oid: str, sent: list[Path]) -> dict[str, dict[str, Any]]:
    """Compare sizes and hashes of what the Hub holds with what was sent; returns them by name."""
    from huggingface_hub.utils.sha import git_hash

    names = [path.name for path in sent]
    there = {item.path: item for item in api.get_paths_info(repo, names, revision=oid)}
    held = {}
    for path in sent:
        item, sha256 = there.get(path.name), file_sha256(path)
        if item is None or item.size != path.stat().st_size:
            raise OSError(f"{path.name} is not there in full after the upload")
        same = (
            item.lfs.sha256 == sha256 if item.lfs else item.blob_id == git_hash(path.read_bytes())
        )
        if not same:
            raise OSError(f"{path.name} has another content after the upload")
        held[path.name] = {"size": item.size, "sha256": sha256}
    return held
