"""What the kernel is asked for on behalf of this process (Linux)."""

import ctypes
import os
import resource
import signal

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE = 1, 4  # linux/prctl.h


def forbid_core_dumps() -> None:
    """Keys and credentials must not reach a disk by way of a crash, nor another process by way of ptrace.

    Raises `OSError`.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _prctl(_PR_SET_DUMPABLE, 0)


def end_with_parent() -> bool:
    """Have SIGTERM sent to this process when its parent ends; returns whether the parent is still there.

    Raises `OSError`.
    """
    parent = os.getppid()
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    return os.getppid() == parent  # it may have ended before the kernel was told


def _prctl(option: int, value: int) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if library.prctl(option, value, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}): {os.strerror(number)}")
