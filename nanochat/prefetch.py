"""Batches made ahead in a thread."""

import queue
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch


class Ahead:
    """Runs an iterator in a thread, up to n items ahead. An error there is raised here, every time it is asked."""

    def __init__(self, items: Iterator[Any], n: int, device: torch.device):
        self._queue: queue.Queue[Any] = queue.Queue(n)
        self._stop = threading.Event()
        self._error: BaseException | None = None
        # The thread knows queue and event, not this object: dropping the loader ends the thread.
        self._thread = threading.Thread(target=_run_ahead, args=(items, self._queue, self._stop, device), daemon=True)
        self._end = weakref.finalize(self, _end_thread, self._stop, self._thread)
        self._thread.start()

    def __iter__(self) -> "Ahead":
        return self

    def __next__(self) -> Any:
        if self._error is None and not self._stop.is_set():
            item = self._queue.get()
            if not isinstance(item, BaseException):
                return item
            self._error = item
        raise self._error or StopIteration

    def close(self) -> None:
        self._end()


def _run_ahead(items: Iterator[Any], out: queue.Queue, stop: threading.Event, device: torch.device) -> None:
    try:
        if device.type == "cuda":  # pin_memory would otherwise open a context on device 0
            torch.cuda.set_device(device)
        for item in items:
            if not _put(out, item, stop):
                return
    except BaseException as e:
        _put(out, e, stop)


def _put(out: queue.Queue, item: Any, stop: threading.Event) -> bool:
    """Put item as soon as there is room; False where the reader has gone."""
    while not stop.is_set():
        try:
            out.put(item, timeout=0.1)
            return True
        except queue.Full:
            pass
    return False


def _end_thread(stop: threading.Event, thread: threading.Thread) -> None:
    stop.set()
    if thread is not threading.current_thread() and thread.is_alive():
        thread.join()
