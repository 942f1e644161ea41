"""Counters and histograms in Prometheus' text format (exposition format 0.0.4)."""

import threading
from bisect import bisect_left
from collections.abc import Iterable

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Histogram:
    """Observations in seconds. Safe to use from several threads."""

    def __init__(self, name: str, text: str) -> None:
        self.name, self.text, self.lock = name, text, threading.Lock()
        self.counts, self.sum = [0] * (len(SECONDS) + 1), 0.0

    def observe(self, seconds: float) -> None:
        with self.lock:
            self.counts[bisect_left(SECONDS, seconds)] += 1
            self.sum += seconds

    def lines(self) -> list[str]:
        lines, total = [f"# HELP {self.name} {self.text}", f"# TYPE {self.name} histogram"], 0
        for limit, count in zip([*map(str, SECONDS), "+Inf"], self.counts, strict=True):
            total += count
            lines.append(f'{self.name}_bucket{{le="{limit}"}} {total}')
        return [*lines, f"{self.name}_sum {self.sum}", f"{self.name}_count {total}"]


class Metrics:
    """What the routes have seen."""

    def __init__(self) -> None:
        self.responses: dict[tuple[str, int], int] = {}
        self.first = Histogram("nanochat_first_token_seconds", "from a request to the first text of its answer")
        self.whole = Histogram("nanochat_request_seconds", "from a request to the end of its answer")

    def answered(self, route: str, status: int) -> None:
        self.responses[route, status] = self.responses.get((route, status), 0) + 1

    def text(self, gauges: dict[str, float], counters: dict[str, float], ended: dict[str, int]) -> str:
        lines = []
        for kind, values in (("gauge", gauges), ("counter", counters)):
            for name, value in values.items():
                lines += [f"# TYPE nanochat_{name} {kind}", f"nanochat_{name} {value}"]
        lines += family("nanochat_rows_ended_total", ((f'reason="{r}"', n) for r, n in sorted(ended.items())))
        labels = ((f'route="{route}",status="{status}"', n) for (route, status), n in sorted(self.responses.items()))
        lines += family("nanochat_responses_total", labels)
        return "\n".join([*lines, *self.first.lines(), *self.whole.lines(), ""])


def family(name: str, values: Iterable[tuple[str, int]]) -> list[str]:
    return [f"# TYPE {name} counter", *(f"{name}{{{labels}}} {value}" for labels, value in values)]
