"""A lock that a forked process can take."""

from __future__ import annotations

import os
import threading


class ForkSafeLock:
    """`with lock.current:` holds a reentrant lock, another one in each forked process.

    Another thread may have held it when the process forked; nobody in the child does, and nobody
    would ever release it there.
    """

    def __init__(self) -> None:
        self.current = threading.RLock()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self.current = threading.RLock()
