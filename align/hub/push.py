"""`align push`: a complete run onto the Hub. The run itself is only read.

What is sent lies in `<run>/.push/` until the Hub has it, so that a failed push goes on where it
was: weights that the Hub already holds are not sent twice, merged weights are not merged again.
"""

import re
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from align.durable import read_json
from align.environment import SECRET
from align.errors import AlignError, Problem, fail
from align.hub import files
from align.hub.facts import RunFacts, is_local, read_run
from align.hub.licences import Licence, llama_licence
from align.lineage import file_digests, file_sha256
from align.locks import locked
from align.report.terminal import say
from align.stopping import stoppable

TIMEOUT = 120.0
"""Seconds that a single answer or block may take; the client itself would wait for ever."""
MERGED_DTYPE: Literal["bfloat16"] = "bfloat16"


class HubFailure(AlignError):
    """The Hub or the way to it failed. Nothing is lost; exit code 1."""

    exit_code = 1


@dataclass(frozen=True)
class Push:
    """What is to be pushed, and where."""

    run: Path
    repo_id: str
    merged: bool = False
    public: bool = False
    revision: str | None = None
    pr: bool = False
    collection: str | None = None
    base_model_id: str | None = None
    samples: int = 3

    @property
    def command(self) -> str:
        """The command line that does this push (again)."""
        words = ["align", "push", str(self.run), "--repo-id", self.repo_id]
        words += [f"--{name}" for name in ("merged", "public", "pr") if getattr(self, name)]
        for name in ("revision", "collection", "base_model_id"):
            if (value := getattr(self, name)) is not None:
                words += [f"--{name.replace('_', '-')}", value]
        if self.samples != 3:
            words += ["--samples", str(self.samples)]
        return shlex.join(words)


def push(asked: Push, *, dry_run: bool = False) -> str | None:
    """Upload a run's model with its tokenizer, settings and card; returns its address.

    The token is huggingface_hub's own (`hf auth login`, HF_TOKEN), and is checked first. All files
    go in one commit, and what the Hub then says it holds is compared with what was sent.

    Raises:
        AlignError: something to mend before anything was sent. `HubFailure`: what the Hub answered,
            and the command that goes on.
    """
    files.check_repo_id(asked.repo_id)
    if asked.pr and asked.revision:
        fail("a pull request is against main", where="--revision", hint="leave --pr or it out")
    if dry_run:
        run = read_run(asked.run, samples=asked.samples)
        with tempfile.TemporaryDirectory(prefix="align-push-") as scratch:
            _prepare(asked, run, Path(scratch), merge_now=False)
            _show(asked, Path(scratch))
            if _merges(asked, run):
                say("          merged weights, made when pushed", results=True)
        return None
    with stoppable(), _client() as api:
        _check_token(asked, api)
        run = read_run(asked.run, samples=asked.samples)
        home = run.folder / ".push"
        with locked(home):
            folder = home / "files"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            base = _prepare(asked, run, folder, merge_now=True)
            _check_hub_base(asked, api, run, base)
            _show(asked, folder)
            address = _send(asked, api, folder)
            shutil.rmtree(home)
    say(f"pushed: {address}", results=True)
    return address


# --- before anything is sent ----------------------------------------------------------------


@contextmanager
def _client() -> Iterator[Any]:
    """The Hub's client with a time limit and without notes of its own on the terminal."""
    from huggingface_hub import HfApi, set_client_factory
    from huggingface_hub.utils import _http, logging
    from huggingface_hub.utils.tqdm import disable_progress_bars

    def limited() -> Any:
        client = _http.default_client_factory()
        client.timeout = TIMEOUT
        return client

    verbosity = logging.get_verbosity()
    logging.set_verbosity(40)  # errors only
    disable_progress_bars()
    set_client_factory(limited)
    try:
        yield HfApi(library_name="align")
    finally:
        set_client_factory(_http.default_client_factory)
        logging.set_verbosity(verbosity)


def _check_token(asked: Push, api: Any) -> None:
    from huggingface_hub import get_token

    if get_token() is None:
        fail(
            "you are not logged in to the Hub",
            where="align push",
            hint="`hf auth login`, or set HF_TOKEN to a token that may write",
        )
    with _answers(asked, "checking the token"):
        who = api.whoami()
        role = ((who.get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read":
        fail(
            f"the token of {who.get('name')} may only read",
            where="align push",
            hint="make one that may write at https://huggingface.co/settings/tokens",
        )


def _merges(asked: Push, run: RunFacts) -> bool:
    return asked.merged and run.base is not None


def _prepare(asked: Push, run: RunFacts, folder: Path, *, merge_now: bool) -> files.Base | None:
    """Fill the folder that is sent, card included; returns the base that it names."""
    from align.hub.card import Upload, model_card

    artifact = run.artifact
    if not (artifact / "config.json").is_file() and run.base is None:
        fail(
            f"a run of `{run.stage.kind}` holds no model",
            where=str(run.folder),
            hint="push a run of sft, reward, dpo or ppo",
        )
    files.check_allowed(artifact)
    files.check_own_base(run)
    merges = _merges(asked, run)
    base = files.public_base(run, asked.base_model_id, adapter=not merges)
    licence = _licence(asked, run, base)
    model = _merged(run) if merges and merge_now else artifact
    texts = files.licence_files(run) if licence else {}
    upload = Upload(
        asked.repo_id,
        base.id if base else None,
        base.revision if base else None,
        adapter=run.base is not None and not merges,
        reward=run.stage.kind == "reward",
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
        if asked.public:
            fail(message, where=f"--repo-id {asked.repo_id}", hint=f"as in `{better}`")
        say(f"note: {message} once others get the model, as in `{better}`")
    return licence


def _merged(run: RunFacts) -> Path:
    """Merged weights in the run's own working folder; those of a push that failed are taken."""
    from align.models.merging import REPORT, merge

    folder = run.folder / ".push" / "merged"
    weights = run.artifact / "adapter_model.safetensors"
    kept = read_json(folder / REPORT) or {}
    same = kept.get("adapter_sha256") == file_sha256(weights) and "merged_into" in kept
    if same and kept.get("dtype") == MERGED_DTYPE:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    say("merging the adapter into its base")
    merge(str(run.folder), folder, dtype=MERGED_DTYPE)
    return folder


def _check_hub_base(asked: Push, api: Any, run: RunFacts, base: files.Base | None) -> None:
    """Refuse a base on the Hub that is not there, or that holds other weights than the local one."""
    if base is None or run.base is None or not is_local(run.base):
        return
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

    with _answers(asked, f"looking at {base.id}"):
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
    who = "public" if asked.public else "private"
    where = "a pull request" if asked.pr else asked.revision or "main"
    head = f"{_size(total)} in {len(found)} files to {asked.repo_id} ({where}, {who}):"
    say(head, results=True)
    for path in found:
        say(f"  {_size(path.stat().st_size):>9}  {path.name}", results=True)


def _size(count: int) -> str:
    for unit, bound in (("B", 1), ("kB", 10**3), ("MB", 10**6), ("GB", 10**9)):
        if count < bound * 1000 or unit == "GB":
            return f"{count} B" if unit == "B" else f"{count / bound:.1f} {unit}"
    raise AssertionError


# --- sending --------------------------------------------------------------------------------


def _send(asked: Push, api: Any, folder: Path) -> str:
    """One commit with all files, checked against what the Hub then holds; returns its address."""
    from huggingface_hub import CommitOperationAdd

    repo = asked.repo_id
    with _answers(asked, "making the repository"):
        api.create_repo(repo, private=not asked.public, exist_ok=True)
        private = api.model_info(repo).private
    if not asked.public and not private:
        fail(
            "is a public repository",
            where=f"--repo-id {repo}",
            hint="say --public if everybody may see this model, or name another repository",
        )
    if asked.public and private:
        say(f"note: {repo} is private and stays so until you change that in its settings")
    with _answers(asked, "uploading"):
        if asked.revision:
            api.create_branch(repo, branch=asked.revision, exist_ok=True)
        _check_mixture(asked, api, folder)
        sent = sorted(folder.iterdir())
        commit = api.create_commit(
            repo,
            [CommitOperationAdd(path.name, str(path)) for path in sent],
            commit_message="Model and card, by align",
            revision=asked.revision,
            create_pr=asked.pr,
        )
        _verify(api, repo, commit.oid, sent)
    if asked.collection:
        with _answers(asked, "the model is uploaded; adding it to the collection"):
            api.add_collection_item(asked.collection, repo, "model", exists_ok=True)
    return str(commit.pr_url or f"{api.endpoint}/{repo}")


def _check_mixture(asked: Push, api: Any, folder: Path) -> None:
    """Refuse a repository in which other weights would lie beside ours: which are loaded then?"""
    there = api.list_repo_files(asked.repo_id, revision=asked.revision)
    other = [name for name in there if files.is_weights(name) and not (folder / name).exists()]
    if other:
        fail(
            f"already holds {other[0]}, which is no part of this push",
            where=f"--repo-id {asked.repo_id}",
            hint="name another repository, or a branch of its own with --revision",
        )


def _verify(api: Any, repo: str, oid: str, sent: list[Path]) -> None:
    """Compare sizes and hashes of what the Hub holds with what was sent."""
    from huggingface_hub.utils.sha import git_hash

    names = [path.name for path in sent]
    there = {item.path: item for item in api.get_paths_info(repo, names, revision=oid)}
    for path in sent:
        item = there.get(path.name)
        if item is None or item.size != path.stat().st_size:
            raise OSError(f"{path.name} is not there in full after the upload")
        same = (
            item.lfs.sha256 == file_sha256(path)
            if item.lfs
            else item.blob_id == git_hash(path.read_bytes())
        )
        if not same:
            raise OSError(f"{path.name} has another content after the upload")


# --- when it fails --------------------------------------------------------------------------

HINTS = {
    401: "log in again with `hf auth login`",
    403: "the token needs write access to this owner's repositories",
    409: "somebody else is changing the repository",
}


@contextmanager
def _answers(asked: Push, doing: str) -> Iterator[None]:
    """Turn what goes wrong with the Hub into an answer with the command that goes on."""
    try:
        yield
    except AlignError:
        raise
    except Exception as error:  # HTTP, sockets, LFS, Xet: each library has its own kinds
        message, status = _what_happened(error)
        hint = "; ".join(filter(None, [HINTS.get(status or 0), "nothing is lost, try again:"]))
        problem = Problem(f"{doing}: {message}", asked.repo_id, f"{hint} {asked.command}")
        raise HubFailure(problem) from None


def _what_happened(error: BaseException) -> tuple[str, int | None]:
    """The Hub's own words, or what the connection did; never a token or a signed address."""
    from huggingface_hub.errors import HfHubHTTPError

    chain: list[BaseException] = [error]
    while (before := chain[-1].__cause__ or chain[-1].__context__) and before not in chain:
        chain.append(before)
    for item in chain:
        if isinstance(item, HfHubHTTPError):
            said = item.server_message or item.response.reason_phrase
            return f"the Hub answered {item.response.status_code} ({_clean(said)})", int(
                item.response.status_code
            )
    first = next((item for item in reversed(chain) if str(item).strip()), error)
    return f"{type(first).__name__}: {_clean(str(first))}", None


def _clean(text: str) -> str:
    from huggingface_hub import get_token

    if token := get_token():
        text = text.replace(token, "<secret>")
    text = SECRET.sub("<secret>", re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]*", r"\1", text))
    return " ".join(text.split())[:400]
