"""What each long-lived task is doing: for `/healthz`, for the metrics, and for the log at changes only."""

import time
from collections.abc import Mapping
from enum import StrEnum

import structlog

logger = structlog.get_logger(__name__)


class TaskState(StrEnum):
    """`stopped` is the end; the others may follow each other in any order."""

    STARTING = "starting"
    RUNNING = "running"
    FAILING = "failing"  # it has failed, and is tried again
    STOPPED = "stopped"


class Task:
    """One long-lived task. Whoever supervises it reports here; a *quiet* one logs at debug."""

    def __init__(self, name: str, *, quiet: bool = False) -> None:
        self.name = name
        self.state = TaskState.STARTING
        self.since = time.time()  # of the last change of state
        self.restarts = 0  # times that it failed after it had been running
        self.fault = ""  # the last one
        self.fault_at: float | None = None  # time.time()
        self._error = logger.debug if quiet else logger.error
        self._info = logger.debug if quiet else logger.info

    def running(self, detail: str = "") -> None:
        """It does its work."""
        if self.state is TaskState.FAILING:
            facts = {"detail": detail} if detail else {}
            self._info(
                f"{self.name}: works again", task=self.name, down_seconds=round(time.time() - self.since, 3), **facts
            )
        self._become(TaskState.RUNNING)

    def failing(self, fault: str) -> None:
        """It failed, and is tried again; said once for each *fault* in a row."""
        if self.state is TaskState.RUNNING:
            self.restarts += 1
        if self.state is not TaskState.FAILING or fault != self.fault:
            self._error(f"{self.name}: {fault}", task=self.name)
        self.fault, self.fault_at = fault, time.time()
        self._become(TaskState.FAILING)

    def stopped(self) -> None:
        """It was told to end, and did."""
        self._become(TaskState.STOPPED)

    def _become(self, state: TaskState) -> None:
        if state is not self.state:
            self.state, self.since = state, time.time()


class Tasks:
    """All of them, by name."""

    def __init__(self) -> None:
        self._tasks: dict[str, Task] = {}

    def add(self, name: str, *, quiet: bool = False) -> Task:
        """The task of that name, new or known already."""
        if name not in self._tasks:
            self._tasks[name] = Task(name, quiet=quiet)
        return self._tasks[name]

    def remove(self, name: str) -> None:
        """It will not be seen any more."""
        self._tasks.pop(name, None)

    def all(self) -> Mapping[str, Task]:
        """Every task, in the order in which they came."""
        return self._tasks
