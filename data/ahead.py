"""An iterator that runs in a process of its own, a few items ahead of who takes them.

What it teaches: a step needs its rows the moment the last step is over, and a thread would make them
under the lock that the loop needs to feed the accelerator. A process has a lock of its own. How far it
may run ahead is a number of items, so memory is bounded; and it is asked, item by item, so that no
queue can fill up and block whoever wants to leave.

    here:   ask, ask, ask -> [soon, soon, soon] -> take the first, ask for one more
    there:  next(iterator) for every question, in order

Packing works this way when there are worker processes (`steps.StepsAhead`): they decode, this one
chooses, lays out rows and stacks pixels. Items travel pickled, arrays as bytes: they need no room in
/dev/shm (the source's index does, once).
"""

from collections import deque
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing.util import Finalize
from typing import Any, Callable, Generator

import torch

from data.stream import end_with_starter


class Ahead:
    """The generator that `make()` returns in another process; at most `most` items are in the works.

    make: something that can be pickled, as a `functools.partial` of a function of a module. What the
    generator raises is raised here, at its turn; BrokenProcessPool when the process dies.
    """

    def __init__(self, make: Callable[[], Generator], most: int):
        self.most = most
        self.coming: deque[Future] = deque()
        context = torch.multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(1, context, _begin_items, (make,))

    def __iter__(self) -> "Ahead":
        return self

    def __next__(self) -> Any:
        while len(self.coming) < self.most:
            self.coming.append(self.pool.submit(_next_item))
        return self.coming.popleft().result()

    def close(self) -> None:
        """End the process, once it has made what it is making."""
        self.coming.clear()
        self.pool.shutdown(wait=False, cancel_futures=True)


def _begin_items(make: Callable[[], Generator]) -> None:
    """What the process does first."""
    global _items
    end_with_starter()
    _items = make()

    # A process waits for its own workers before it ends. They must be told before the queue to them
    # is closed, which has priority 10.
    Finalize(None, _items.close, exitpriority=100)


def _next_item() -> Any:
    return next(_items)
