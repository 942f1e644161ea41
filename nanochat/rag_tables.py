"""The RAG evaluation as Markdown tables. Every cell is a mean with its 95 % interval."""

from collections import Counter
from collections.abc import Mapping, Sequence

from nanochat.blocks.pattern import entry_name, resolve_pattern
from nanochat.rag_eval import (
    Figure,
    Prediction,
    difference,
    figure,
    figures,
    limited,
    retrieval_values,
    summary,
)
from nanochat.report import aligned_table

Predictions = Sequence[Prediction]
COMPARED = ("EM", "F1", "accuracy", "hallucination", "coverage")
PAIRS = (("rag", "closed_book"), ("rag", "documents_untrained"), ("oracle", "rag"), ("shuffled", "closed_book"))
ARCHITECTURE = ("EM", "F1", "reading EM", "accuracy", "abstention", "hallucination", "citation precision")


def cell(found: Figure | None) -> str:
    return "-" if found is None else str(found)


def condition_table(runs: Mapping[str, Predictions]) -> str:
    """A row for each metric, a column for each condition."""
    found = {name: summary(run) for name, run in runs.items()}
    metrics = dict.fromkeys(metric for figures in found.values() for metric in figures)
    order = [m for m in next(iter(runs.values()))[0].values if m in metrics]
    return aligned_table([["", *found], *([m, *(cell(f.get(m)) for f in found.values())] for m in order)])


def retrieval_figures(run: Predictions) -> dict[str, Figure]:
    return figures([retrieval_values(p.question, p.offered) for p in run])


def difference_table(runs: Mapping[str, Predictions]) -> str:
    """Paired over the questions; an interval without 0 says that the two differ."""
    pairs = [(a, b) for a, b in PAIRS if a in runs and b in runs]
    rows = [[f"{a} - {b}", *(cell(difference(runs[a], runs[b], m)) for m in COMPARED)] for a, b in pairs]
    return aligned_table([["", *COMPARED], *rows]) if rows else ""


def equal_coverage(a: Predictions, b: Predictions) -> tuple[list[Prediction], list[Prediction]]:
    """Both with as many answers as the one that gave fewer, the surest of each."""
    n = min(sum(p.answered for p in run) for run in (a, b))
    return limited(a, n), limited(b, n)


def coverage_table(runs: Mapping[str, Predictions]) -> str:
    """Hallucination where both answer equally many questions, and by how much less it is."""
    rows = []
    for other in ("closed_book", "documents_untrained"):
        if "rag" in runs and other in runs:
            rag, base = equal_coverage(runs["rag"], runs[other])
            ours, theirs = figure([p.values["hallucination"] or 0.0 for p in rag]), summary(base)["hallucination"]
            less = f"{1 - ours.value / theirs.value:.1%}" if theirs.value else "-"
            share = sum(p.answered for p in rag) / len(rag)
            rows.append([other, f"{share:.3f}", cell(ours), cell(theirs), less,
                         cell(difference(rag, base, "hallucination"))])  # fmt: skip
    head = ["beside", "share answered", "hallucination, rag", "hallucination, other", "less by", "rag - other"]
    return aligned_table([head, *rows]) if rows else ""


def kind_table(runs: Mapping[str, Predictions]) -> str:
    """EM by kind of question under each condition, and what the model did with those that have no answer."""
    rag = runs["rag"]
    kinds = sorted({p.question.kind for p in rag})
    rows = []
    for kind in kinds:
        chosen = [i for i, p in enumerate(rag) if p.question.kind == kind]
        found = {name: summary([run[i] for i in chosen]) for name, run in runs.items()}
        gold = retrieval_figures([rag[i] for i in chosen])
        row = [kind, str(len(chosen)), cell(gold.get("all gold")), *(cell(f.get("EM")) for f in found.values())]
        rows.append([*row, *(cell(found["rag"].get(m)) for m in ("reading EM", "abstention", "hallucination"))])
    head = ["kind", "n", "all gold retrieved", *(f"EM, {name}" for name in runs)]
    return aligned_table([[*head, "reading EM, rag", "abstention, rag", "hallucination, rag"], *rows])


def size_table(sweeps: Mapping[str, Mapping[int, Predictions]]) -> str:
    """EM where the gold document stands among n, by n; a row for each model."""
    sizes = sorted({n for sweep in sweeps.values() for n in sweep})
    rows = [
        [name, *(cell(summary(sweep[n]).get("EM")) if n in sweep else "-" for n in sizes)]
        for name, sweep in sweeps.items()
    ]
    return aligned_table([["documents", *map(str, sizes)], *rows]) if sizes else ""


def by_position(run: Predictions) -> dict[int, Figure]:
    """EM by the place of the gold document, counted from 1; for questions with one."""
    groups: dict[int, list[float]] = {}
    for p in run:
        place = next((n for n, id in enumerate(p.offered, 1) if id in p.question.gold_ids), None)
        if place is not None:
            groups.setdefault(place, []).append(p.values["EM"] or 0.0)
    return {place: figure(groups[place]) for place in sorted(groups)}


def position_table(found: Mapping[str, Mapping[int, Figure]]) -> str:
    places = sorted({place for figures in found.values() for place in figures})
    rows = [[name, *(cell(figures.get(place)) for place in places)] for name, figures in found.items()]
    return aligned_table([["place of the gold document", *map(str, places)], *rows]) if places else ""


def architecture_table(models: Mapping[str, str], runs: Mapping[str, Mapping[str, Predictions]]) -> str:
    """A row for each model: its layers, figures with retrieved documents, EM with gold ones, EM against the first."""
    first = next(iter(runs.values()))
    rows = []
    for name, run in runs.items():
        found, oracle = summary(run["rag"]), summary(run["oracle"])
        against = "-" if run is first else cell(difference(run["rag"], first["rag"], "EM"))
        rows.append([name, models[name], *(cell(found.get(m)) for m in ARCHITECTURE), cell(oracle.get("EM")), against])
    return aligned_table([["checkpoint", "layers", *ARCHITECTURE, "EM, oracle", "EM - first's"], *rows])


def layers(pattern: list | str | None, n_layer: int) -> str:
    """["attn", "attn", "mamba"] -> "2 attn, 1 mamba"."""
    counts = Counter(map(entry_name, resolve_pattern(pattern, n_layer)))
    return ", ".join(f"{n} {name}" for name, n in counts.items())
