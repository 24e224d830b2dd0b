"""Locks that a child process made by fork() finds open, whichever thread of its parent held them."""

import os
import threading
import weakref

_locks = weakref.WeakSet()


class Lock:
    """threading.Lock() for ``with``, made anew in a child process: the thread that holds it is not there."""

    def __init__(self):
        self._lock = threading.Lock()
        _locks.add(self)

    def __enter__(self):
        self._lock.acquire()

    def __exit__(self, *_):
        self._lock.release()

    def renew(self) -> None:
        self._lock = threading.Lock()


def renew_all() -> None:
    for lock in list(_locks):
        lock.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=renew_all)
