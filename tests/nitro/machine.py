"""An image of ours in the emulator."""

import subprocess
import sys
import time
from pathlib import Path

from tests.nitro import boot_image
from tests.nitro.guest import wait_for

MEMORY = 256  # MiB; nitro-cli wants four times the image


class Machine:
    """An image in the emulator, under its own CID; its vsock device is the unix socket at `base`."""

    def __init__(self, image: Path, directory: Path, cid: int) -> None:
        self.base = directory / f"{cid}.sock"
        self.console_file = directory / f"job-{cid}/console"
        self.console_file.parent.mkdir()
        self._log = directory / f"boot-{cid}.log"
        self.began = time.monotonic()
        command = [sys.executable, boot_image.__file__, image, self.base, self.console_file.parent, cid, MEMORY]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [str(word) for word in command], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    @property
    def console(self) -> str:
        return self.console_file.read_text(errors="replace") if self.console_file.exists() else ""

    def wait_for(self, text: str) -> float:
        """Seconds from the start until the console says *text*."""
        wait_for(lambda: text in self.console or self._process.poll() is not None, text)
        assert text in self.console, self.console[-3000:] + self._log.read_text(errors="replace")
        return time.monotonic() - self.began

    def kill(self) -> None:
        self._process.terminate()
        self._process.wait()
