"""The Hub's client, what this account may do there, and answers to what goes wrong.

Everything that can refuse a push is asked before a model is loaded; nothing is made or changed.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from align.config.pushing import Asked
from align.config.sections import HubSection
from align.errors import AlignError, HubFailure, Problem, fail
from align.hub import files
from align.report.terminal import say
from align.secrets import scrub

TIMEOUT = 120.0
"""Seconds that a single answer or block may take; the client itself would wait for ever."""

TOKENS = "https://huggingface.co/settings/tokens"
OFFLINE = "set HF_HUB_OFFLINE=1 to train now; the same command pushes once it is unset"
REFUSED = (401, 403, 404)
"""Answers that a user has to mend; others are the Hub's or the way's."""

HINTS = {
    401: "log in again with `hf auth login`",
    403: "the token needs write access to this owner's repositories",
    409: "somebody else is changing the repository",
}


@contextmanager
def client() -> Iterator[Any]:
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


# --- the account ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Account:
    """Who is logged in, and where that token may write."""

    name: str
    orgs: Mapping[str, str]
    """Name of an organization -> the role in it."""
    scopes: Sequence[Mapping[str, Any]] | None
    """What a fine-grained token is for; None for other tokens."""

    def check_owner(self, repo_id: str) -> None:
        """Refuse an owner whose repositories this token cannot write to."""
        owner = repo_id.partition("/")[0]
        where = f"repo_id: {repo_id}"
        if owner != self.name and owner not in self.orgs:
            mine = ", ".join(f"`{name}`" for name in (self.name, *self.orgs))
            message = f"`{owner}` is neither this account nor one of its organizations"
            fail(message, where=where, hint=f"push to {mine}, log in as another, or open a PR")
        if self.orgs.get(owner) == "read":
            hint = "ask for a role that may write there"
            fail(f"this account may only read in `{owner}`", where=where, hint=hint)
        if self.scopes is not None and not any(_writes(one, repo_id) for one in self.scopes):
            hint = f"give it write access to that owner's repositories at {TOKENS}"
            fail(f"the token was not made to write to `{owner}`", where=where, hint=hint)


def _writes(scope: Mapping[str, Any], repo_id: str) -> bool:
    name = (scope.get("entity") or {}).get("name")
    return name in (repo_id, repo_id.partition("/")[0]) and "repo.write" in scope["permissions"]


def who_am_i(api: Any, repo_id: str, way_on: str) -> Account:
    """Who the token belongs to.

    Raises:
        AlignError: no token, or one that may only read. HubFailure: the Hub does not take it.
    """
    from huggingface_hub import get_token

    if get_token() is None:
        fail(
            "you are not logged in to the Hub",
            where="align push",
            hint="`hf auth login`, or set HF_TOKEN to a token that may write",
        )
    with answers(repo_id, "checking the token", way_on):
        who = api.whoami(cache=True)  # once per command: the Hub counts these
    token = (who.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        fail(
            f"the token of {who.get('name')} may only read",
            where="align push",
            hint=f"make one that may write at {TOKENS}",
        )
    orgs = {str(org.get("name")): str(org.get("roleInOrg")) for org in who.get("orgs") or ()}
    scopes = (token.get("fineGrained") or {}).get("scoped")
    return Account(str(who.get("name")), orgs, scopes if isinstance(scopes, list) else None)


def check_account(api: Any, hub: HubSection, way_on: str) -> Account:
    """Who is logged in; refuses a token that cannot write where this push goes."""
    account = who_am_i(api, str(hub.repo_id), way_on)
    if not hub.pr:  # anybody may open a pull request
        account.check_owner(str(hub.repo_id))
    return account


# --- before a training that ends in a push --------------------------------------------------


def check_ahead(pushes: Sequence[Asked], *, way_out: str) -> None:
    """Ask the Hub, before anything runs, whether these pushes can be made at the end.

    With HF_HUB_OFFLINE nothing is asked, and that is said. A Hub that cannot be reached stops the
    command here: a push that is known to be wanted is not left to luck.

    Args:
        pushes: what the recipe asks for.
        way_out: how to go without a push.

    Raises:
        AlignError: every push that would be refused. HubFailure: the Hub could not be asked.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        names = ", ".join(str(asked.hub.repo_id) for asked in pushes)
        say(f"note: HF_HUB_OFFLINE is set, so nobody knows whether {names} can be pushed to")
        return
    way_on = f"nothing has run yet, try again; or {OFFLINE}; or {way_out}"
    problems: list[Problem] = []
    sent = [str(asked.hub.repo_id) for asked in pushes]
    with client() as api:
        with _refusals(problems, way_out):
            who_am_i(api, sent[0], way_on)
        for asked in pushes if not problems else ():
            with _refusals(problems, way_out):
                account = check_account(api, asked.hub, way_on)
                _check_there(api, account, asked, sent, way_on)
    if problems:
        raise AlignError(*problems)


@contextmanager
def _refusals(problems: list[Problem], way_out: str) -> Iterator[None]:
    """What the user has to mend goes to `problems`; what the Hub has to mend is raised."""
    try:
        yield
    except HubFailure as error:
        if error.status not in REFUSED:
            raise
        hint = "; ".join(filter(None, [HINTS.get(error.status), f"or {way_out}"]))
        problems += [Problem(one.message, one.where, hint) for one in error.problems]
    except AlignError as error:
        problems += error.problems


def _check_there(
    api: Any, account: Account, asked: Asked, sent: Sequence[str], way_on: str
) -> None:
    """The repository, the base and the collection of a push, as they stand now."""
    hub, repo = asked.hub, str(asked.hub.repo_id)
    with answers(repo, "looking at the repository", way_on):
        info = _model(api, repo)
        if info is not None and not hub.pr:
            api.auth_check(repo, write=True)
    if info is not None:
        _check_repository(asked, info)
    else:
        account.check_owner(repo)  # it has to be made, for a pull request too
    base = (hub.base_model_id or "").partition("@")[0]
    if base and base not in sent:
        with answers(repo, f"looking at {base}", way_on):
            if _model(api, base) is None:
                hint = "push the base first, or mend its name"
                fail("is not on the Hub", where=f"base_model_id: {base}", hint=hint)
    if hub.collection:
        with answers(repo, f"looking at the collection {hub.collection}", way_on):
            api.get_collection(hub.collection)


def _model(api: Any, repo: str) -> Any | None:
    """What the Hub says of a model; None where there is none, or none that this token may see."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return api.model_info(repo)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        return None


def _check_repository(asked: Asked, info: Any) -> None:
    """Refuse a repository that is public by accident, or that holds another kind of weights."""
    hub = asked.hub
    where = f"repo_id: {hub.repo_id}"
    if not info.private and not hub.public:
        hint = "set `hub.public: true` if everybody may see this model, or name another repository"
        fail("is a public repository", where=where, hint=hint)
    if hub.revision is not None or asked.sends_adapter is None:
        return
    there = [item.rfilename for item in info.siblings or ()]
    other = [
        name
        for name in there
        if files.is_weights(name) and name.startswith("adapter_") != asked.sends_adapter
    ]
    if other:
        mine = "an adapter" if asked.sends_adapter else "full weights"
        hint = "name another repository, or a branch of its own with `hub.revision`"
        fail(f"already holds {other[0]}, and {mine} would lie beside it", where=where, hint=hint)


# --- when it fails --------------------------------------------------------------------------


@contextmanager
def answers(repo_id: str, doing: str, way_on: str) -> Iterator[None]:
    """Turn what goes wrong with the Hub into an answer with the way on."""
    try:
        yield
    except AlignError:
        raise
    except Exception as error:  # HTTP, sockets, LFS, Xet: each library has its own kinds
        message, status = _what_happened(error)
        hint = "; ".join(filter(None, [HINTS.get(status or 0), way_on]))
        failure = HubFailure(Problem(f"{doing}: {message}", repo_id, hint))
        failure.status = status
        raise failure from None


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
    text = scrub(re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]*", r"\1", text))
    return " ".join(text.split())[:400]
