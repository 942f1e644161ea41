"""Was a fault met as it should be, and the table of what happened."""

import json
import re
from collections import Counter
from dataclasses import asdict, dataclass, field

from tests.faults.children import Done

CURES = re.compile(
    r"\b(restore|make|build|delete|remove|free|set|choose|run|train|add|pass|give|fetch|mend|use|load|loads|resume|"
    r"expected|wait|check|bring|name|replace|did you mean)\b|--\w"
)
KEPT = 6  # examples of each kind of failure


@dataclass(frozen=True)
class Verdict:
    """What a command that met a fault did. Empty strings are well."""

    code: int
    trace: str = ""
    vague: str = ""  # exit 2 without one line that names the place and a cure
    wrong: str = ""  # exit 0, but not the healthy result


def judge(done: Done, names: list[str], same: bool) -> Verdict:
    """names: one of them must stand in the line. same: whether the result is the healthy one."""
    tail = (done.err.strip().splitlines() or [""])[-1]
    if done.trace or done.code not in (0, 2):
        return Verdict(done.code, trace=tail or f"exit code {done.code}")
    if done.code == 0:
        return Verdict(0, wrong="" if same else "exit 0 with another result")
    lines = [line for line in done.err.splitlines() if line.startswith("error: ")]
    clear = len(lines) == 1 and tail == lines[0] and any(name in tail for name in names) and CURES.search(tail)
    return Verdict(2, vague="" if clear else tail or "nothing on stderr")


@dataclass
class Row:
    """One fault at one place."""

    fault: str
    where: str
    tried: int = 0
    lost: int = 0
    tracebacks: int = 0
    wrong: int = 0
    vague: int = 0
    codes: Counter[int] = field(default_factory=Counter)
    remark: str = ""
    examples: list[str] = field(default_factory=list)

    @property
    def failed(self) -> int:
        return self.lost + self.tracebacks + self.wrong + self.vague


class Tally:
    def __init__(self) -> None:
        self.rows: dict[tuple[str, str], Row] = {}

    def count(
        self, fault: str, where: str, verdict: Verdict | None = None, lost: str = "", case: str = "", remark: str = ""
    ) -> None:
        """One more fault. verdict: None where the process was killed. case: what to do to see it again."""
        row = self.rows.setdefault((fault, where), Row(fault, where, remark=remark))
        row.tried += 1
        found = {"lost": lost}
        if verdict is not None:
            row.codes[verdict.code] += 1
            found |= {"tracebacks": verdict.trace, "wrong": verdict.wrong, "vague": verdict.vague}
        for kind, message in found.items():
            if message:
                setattr(row, kind, getattr(row, kind) + 1)
                if len(row.examples) < KEPT:
                    row.examples.append(f"{kind}: {case}: {message[:300]}")

    @property
    def failed(self) -> int:
        return sum(row.failed for row in self.rows.values())

    def as_json(self) -> list[dict]:
        return [asdict(row) | {"codes": {str(k): v for k, v in row.codes.items()}} for row in self.rows.values()]

    def take(self, text: str) -> None:
        """Add the rows of another tally, written by as_json."""
        for row in json.loads(text):
            codes = Counter({int(k): v for k, v in row.pop("codes").items()})
            self.rows[row["fault"], row["where"]] = Row(**row, codes=codes)

    def table(self) -> str:
        """Markdown; below it the failures."""
        names = ("fault", "where", "tried", "lost", "tracebacks", "wrong", "vague", "exit codes", "remark")
        lines = [names, tuple("-" * len(name) for name in names)]
        for row in self.rows.values():
            codes = ", ".join(f"{code}: {n}" for code, n in sorted(row.codes.items())) or "killed"
            counts = map(str, (row.tried, row.lost, row.tracebacks, row.wrong, row.vague))
            lines.append((row.fault, row.where, *counts, codes, row.remark))
        widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
        text = [f"| {' | '.join(c.ljust(w) for c, w in zip(line, widths, strict=True))} |" for line in lines]
        return "\n".join([*text, *(f"{r.fault}, {r.where}: {e}" for r in self.rows.values() for e in r.examples)])
