"""Shares of all ranks together are the whole, in order, whatever the number of processes."""

from itertools import chain

import pytest

from align.generation import processes
from align.generation.processes import in_shares


def test_one_process_does_everything():
    assert in_shares([3, 1, 2], lambda share: [value * 10 for value in share]) == [30, 10, 20]


@pytest.mark.parametrize("world", [2, 3, 5])
@pytest.mark.parametrize("count", [0, 1, 7])
def test_every_rank_gets_all_results(world, count, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    items = [f"item {n}" for n in range(count)]
    sent: dict[int, list] = {}
    shares = []

    def work(share):
        shares.append(share)
        return [text.upper() for text in share]

    def gather(own):
        sent[len(sent)] = own
        return own

    monkeypatch.setattr(processes, "gathered", gather)
    for rank in range(world):
        monkeypatch.setenv("RANK", str(rank))
        in_shares(items, work)
    assert sorted(chain.from_iterable(shares)) == items
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    together = list(chain.from_iterable(sent.values()))
    monkeypatch.setattr(processes, "gathered", lambda _: together)
    assert in_shares(items, work) == [text.upper() for text in items]
