"""Work shared out among the processes of a launch, and its results brought together."""

import os
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import TypeVar

from align.environment import world_size

Item = TypeVar("Item")
Result = TypeVar("Result")


def gathered(items: list[Item]) -> list[Item]:
    """The items of all processes, those of rank 0 first; every process calls it and gets all."""
    if world_size() == 1:
        return items
    from accelerate.utils import gather_object

    everything: list[Item] = gather_object(items)
    return everything


def in_shares(
    items: Sequence[Item], work: Callable[[list[Item]], Sequence[Result]]
) -> list[Result]:
    """What `work` makes of the items, one result each; every process works on its share.

    Process r of n takes the items r, r + n, ...; all get all results, in the order of the items.
    """
    places = range(int(os.environ.get("RANK", "0")), len(items), world_size())
    results = work([items[place] for place in places])
    return [result for _, result in sorted(gathered(_numbered(places, results)), key=itemgetter(0))]


def _numbered(places: Sequence[int], results: Sequence[Result]) -> list[tuple[int, Result]]:
    return list(zip(places, results, strict=True))
