"""The keys by which transformers, TRL and the handbook push to the Hub, as our section `hub`."""

from collections.abc import Callable

from align.translation.trl_rules import PUSH
from align.translation.work import Work

OFF = "nothing is pushed: `push_to_hub` is off"
NO_OWNER = "names no owner; `hub.repo_id: ORG/NAME` pushes the complete run"
PLACES = ("hub_model_id", "push_to_hub_model_id")
BRANCHES = ("hub_revision", "push_to_hub_revision", "hub_model_revision")


def push(work: Work) -> None:
    """Where and how the run is pushed. axolotl pushes wherever `hub_model_id` is given."""
    on = bool(work.given.get("push_to_hub"))
    owner = work.given.get("push_to_hub_organization")
    if work.tool == "axolotl":
        on = on or work.given.get("hub_model_id") is not None
    key = next((key for key in PLACES if work.given.get(key)), None)
    name = str(work.given[key]) if key else ""
    if owner and name and "/" not in name:
        name = f"{owner}/{name}"
    known = on and "/" in name and "hub.repo_id" in work.leaves
    if known and key is not None:
        work.take(key)
        work.give("hub.repo_id", name, key, "pushed once, when the run is complete")
    for each in (key for key in PUSH if key in work.given and key not in work.taken):
        value = work.take(each)
        if not on:
            work.say(each, "dropped", None, "off" if each == "push_to_hub" else OFF)
        elif each == "push_to_hub":
            why = "`hub.repo_id` says it" if known else f"on, and the recipe {NO_OWNER}"
            work.say(each, "dropped", None, why)
        elif not known:
            work.say(each, "dropped", None, f"`{value}` {NO_OWNER}" if each in PLACES else NO_OWNER)
        else:
            _how(work, each, value)


def _how(work: Work, key: str, value: object) -> None:
    if key == "hub_private_repo" and value is False:
        work.give("hub.public", True, key)
    elif key == "hub_private_repo":
        work.say(key, "dropped", None, "a push is private unless `hub.public: true`")
    elif key in BRANCHES and value not in (None, "main"):
        work.give("hub.revision", value, key)
    else:
        work.say(key, "dropped", None, "`hub.repo_id` and `hub.revision` say it")


JOINT: dict[tuple[str, str], Callable[[Work], None]] = dict.fromkeys(
    (("", key) for key in PUSH), push
)
