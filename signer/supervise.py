"""Keeping a long-lived task running: faults restart it with back-off and jitter, bugs end the process with a trace.

A *fault* is what a peer or the system can cause, and what may be over at the next try. Everything else, also in a
group beside a fault, is a bug: it propagates, since nobody knows what state it left behind.

The first start is an exception: its fault propagates too, so that a port in use is said at once to whoever starts the
signer, instead of being tried for ever behind their back. What the signer can do without (`must_start=False`) is tried
again also then.

Not supervised here: the vaults, which restart parts of themselves (sessions, credentials, discovery) and report them,
and the watermark store. That one meets its I/O errors commit by commit (each refuses its requests, and the next commit
tries the disk anew), so what ends it is a bug, and signing on beside a store in an unknown state risks a double
signature: the process ends.
"""

import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

import trio

from signer.observe.tasks import Task

__all__ = ["FAULTS", "Backoff", "Service", "describe", "leaves", "open_nursery", "supervise"]

Service = Callable[..., Awaitable[object]]
"""Takes `task_status`, and reports started once it can be used; returns when it was told to end."""

_T = TypeVar("_T")  # what the service starts with

FAULTS: tuple[type[Exception], ...] = (OSError, trio.BrokenResourceError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """How long to wait before the next try, in seconds; each pause is twice the one before.

    A service that ran for *stable_after* counts as mended: its next fault begins at *first_delay* again. *jitter* is
    the share by which a pause varies either way, so that several signers don't try in step.
    """

    first_delay: float = 0.1
    max_delay: float = 10.0
    stable_after: float = 10.0
    jitter: float = 0.2

    def pause(self, tries: int) -> float:
        """Seconds to wait after *tries* failures in a row."""
        doubled = self.first_delay * 2.0 ** min(tries - 1, 32)  # far beyond any bound, and no overflow
        spread = random.uniform(1 - self.jitter, 1 + self.jitter)  # noqa: S311  # no secret
        return spread * float(min(doubled, self.max_delay))


async def supervise(
    task: Task,
    service: Service,
    *,
    faults: tuple[type[Exception], ...] = FAULTS,
    backoff: Backoff | None = None,
    stop: trio.Event | None = None,
    must_start: bool = True,
    task_status: trio.TaskStatus[_T] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Keep *service* running until it returns or, while it waits for the next try, until *stop*.

    Started with what *service* started with the first time. Its states are reported to *task*. Raises whatever the
    first start raises if it *must_start*, and afterwards whatever is none of *faults*; in a group of both the bug.
    """
    backoff = backoff or Backoff()
    stop = trio.Event() if stop is None else stop
    announced, tries = False, 0
    try:
        while True:
            fault, served_since = "", float("inf")
            try:
                async with trio.open_nursery() as nursery:
                    value: _T = await nursery.start(service)
                    served_since = trio.current_time()
                    task.running()
                    if not announced:
                        announced = True
                        task_status.started(value)
            except* faults as group:
                if must_start and not announced:
                    raise
                fault = describe(group)
            if not fault:
                return
            mended = trio.current_time() - served_since >= backoff.stable_after
            tries = 1 if mended else tries + 1
            task.failing(fault)
            with trio.move_on_after(backoff.pause(tries)):
                await stop.wait()
            if stop.is_set():
                return
    finally:
        task.stopped()


def describe(error: BaseException) -> str:
    """*error* for a person: the texts of all that a group holds, each once, none of them empty."""
    return "; ".join(dict.fromkeys(str(one) or type(one).__name__ for one in leaves(error)))


def leaves(error: BaseException) -> Iterator[BaseException]:
    """The errors that are no groups."""
    if isinstance(error, BaseExceptionGroup):
        for one in error.exceptions:
            yield from leaves(one)
    else:
        yield error


@asynccontextmanager
async def open_nursery() -> AsyncIterator[trio.Nursery]:
    """A nursery that lets a lone error out as it is, and a group only where several things went wrong."""
    try:
        async with trio.open_nursery() as nursery:
            yield nursery
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
            (error,) = error.exceptions
        if error is group:
            raise
        raise error from error.__cause__
