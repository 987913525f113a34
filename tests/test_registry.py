"""Registered names lead to functions; nothing else does."""

import pytest

from align import registry
from align.errors import AlignError
from align.registry import register_judge, register_pair_rule, resolve


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    monkeypatch.setattr(registry, "JUDGES", dict(registry.JUDGES))
    monkeypatch.setattr(registry, "PAIR_RULES", dict(registry.PAIR_RULES))


@pytest.mark.parametrize("name", sorted(registry.JUDGES))
def test_every_judge_is_there(name):
    assert callable(resolve("judge", name))


@pytest.mark.parametrize("name", sorted(registry.PAIR_RULES))
def test_every_pair_rule_is_there(name):
    assert callable(resolve("pair rule", name))


@pytest.mark.parametrize("name", ["os.system", "os:system", "number ", "", "nmber"])
def test_other_names_are_refused(name):
    with pytest.raises(AlignError, match="no judge is called"):
        resolve("judge", name)


def test_a_near_name_is_suggested():
    with pytest.raises(AlignError, match="did you mean `best_worst`"):
        resolve("pair rule", "best_wurst")


def test_functions_can_be_registered_once():
    def judge(row, completion):
        return {"score": 1.0}

    register_judge("mine", judge)
    register_judge("mine", judge)
    assert resolve("judge", "mine") is judge
    with pytest.raises(AlignError, match="exists already"):
        register_judge("mine", lambda row, completion: {"score": 0.0})
    register_pair_rule("mine", lambda groups, *, seed: [])
    assert resolve("pair rule", "mine")([], seed=0) == []
