"""The board of tasks: states, counts, and a log at changes only."""

from structlog.testing import capture_logs

from signer.observe.tasks import Tasks, TaskState


def test_changes_are_logged_and_nothing_else() -> None:
    tasks = Tasks()
    task = tasks.add("vault n")
    assert tasks.add("vault n") is task
    with capture_logs() as logs:
        task.running()
        assert logs == [], "a first start is no news"
        for _ in range(3):
            task.failing("gone")
        task.failing("refused")
        for _ in range(2):
            task.running("2 sessions")
    assert [(line["log_level"], line["event"]) for line in logs] == [
        ("error", "vault n: gone"),
        ("error", "vault n: refused"),
        ("info", "vault n: works again"),
    ]
    assert logs[-1]["detail"] == "2 sessions"
    assert (task.state, task.restarts, task.fault) == (TaskState.RUNNING, 1, "refused")
    assert task.fault_at is not None


def test_failing_from_the_start_is_no_restart() -> None:
    task = Tasks().add("t")
    began = task.since
    assert (task.state, task.fault_at) == ("starting", None)
    task.failing("gone")
    task.running()
    assert task.restarts == 0
    task.failing("gone")
    assert task.restarts == 1
    assert task.since >= began
    task.stopped()
    assert task.state == "stopped"


def test_a_quiet_task_logs_at_debug() -> None:
    with capture_logs() as logs:
        task = Tasks().add("session", quiet=True)
        task.failing("gone")
        task.running()
    assert {line["log_level"] for line in logs} == {"debug"}


def test_what_is_removed_is_gone() -> None:
    tasks = Tasks()
    tasks.add("a")
    tasks.add("b")
    tasks.remove("a")
    tasks.remove("never there")
    assert list(tasks.all()) == ["b"]
