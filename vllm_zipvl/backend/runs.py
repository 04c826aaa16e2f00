"""Work cut so that it takes no more memory at once than was held for it."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def runs_of(
    items: Sequence[Item], num_tokens: Callable[[Item], int], limit: int, is_padded: bool = False
) -> Iterator[list[Item]]:
    """Items in turn, as many at a time as have `limit` tokens together, but at least one.

    Args:
        items: Requests of some kind.
        num_tokens: Of an item.
        limit: Tokens of a run.
        is_padded: Whether each item counts as many tokens as the longest of its run.
    """
    run: list[Item] = []
    for item in items:
        sizes = [num_tokens(one) for one in (*run, item)]
        if run and (max(sizes) * len(sizes) if is_padded else sum(sizes)) > limit:
            yield run
            run = []
        run.append(item)
    if run:
        yield run
