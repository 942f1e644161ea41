"""Bytes per token of our tokenizer on several kinds of text, beside GPT-2, cl100k (GPT-4) and o200k (GPT-4o).

    python -m scripts.tok_eval

The other vocabularies are read from <data>/tok/vocab (NANOCHAT_DATA): r50k_base.tiktoken, cl100k_base.tiktoken and
o200k_base.tiktoken as OpenAI publishes them (a base64 token and its rank a line; .gz is fine), and pattern_strings.json
with the regex of each. Nothing is downloaded; a vocabulary or a text that is not there is named and left out.
"""

import base64
import gzip
import json
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from nanochat.common import data_dir, read_json, run_script
from nanochat.config import UserError, load_config
from nanochat.dataset import iter_documents
from nanochat.report import log_stage
from nanochat.tokenizer import Tokenizer

VOCABULARIES = {"GPT-2": "r50k_base", "cl100k": "cl100k_base", "o200k": "o200k_base"}
CODE_FILES = ["argparse.py", "ast.py", "dataclasses.py", "inspect.py", "json/decoder.py", "random.py", "typing.py"]
DATA_FILES = {
    "english": "text/wikitext2_valid.txt.gz",
    "math": "eval/gsm8k_test_dev.jsonl.gz",
    "multilingual": "text/udhr_multilingual.jsonl.gz",
}
# Used where the data folder is absent: short, so their figures are rough.
EMBEDDED = {
    "english": """The town council voted on Tuesday to keep the old bridge open for another year. Engineers who looked
at the piers in spring found rust on four of the twelve, and asked for 2.3 million to mend them. "We can pay for half of
it," said the mayor, "and the county has promised the rest." Shopkeepers on the east bank had feared a summer without
visitors; most of them were relieved. The bakery at the corner, which opened in 1962, will not have to move after all.
""",
    "math": """Let f(x) = 3x^2 - 12x + 7. Then f'(x) = 6x - 12 = 0 at x = 2, so the minimum is f(2) = 12 - 24 + 7 = -5.
A box holds 48 pencils. Four classes share 13 boxes: 13 * 48 = 624 and 624 / 4 = 156 pencils each. #### 156
The sum of the first n odd numbers is 1 + 3 + ... + (2n - 1) = n^2; with n = 10 it is 100. P(A or B) <= P(A) + P(B).
""",
    "multilingual": """Der Zug nach Süden fährt heute später, weil es auf der Strecke geschneit hat.
Le marché ouvre à huit heures ; on y trouve du pain, des œufs et des fleurs.
Mañana vamos a la playa si no llueve, ¿quieres venir con nosotros?
Утром мы пили чай и смотрели, как над рекой поднимается туман.
今日は朝から雨が降っているので、図書館で本を読みます。 今天下雨，我们在家里看书。
오늘 아침에는 비가 와서 집에서 책을 읽었습니다. في الصباح شربنا الشاي ونظرنا إلى النهر.
आज सुबह बारिश हुई और हम घर पर रहे। Σήμερα το πρωί έβρεχε και μείναμε στο σπίτι.
""",
}


@dataclass(frozen=True)
class TokEvalConfig:
    """Bytes per token of our tokenizer and of published ones."""

    max_chars: Annotated[int, "characters of each kind of text"] = 400_000

    def __post_init__(self) -> None:
        if self.max_chars < 1:
            raise ValueError(f"max_chars={self.max_chars}: give a positive number of characters")


def main(argv: list[str]) -> None:
    cfg = load_config(TokEvalConfig, argv)
    ours = Tokenizer.load()
    data = data_dir()
    texts, missing_texts = load_texts(data, cfg.max_chars)
    others, missing = load_vocabularies(data)
    rows = {}
    for kind, text in texts.items():
        if ours.decode(ours.encode(text)) != text:
            raise RuntimeError(f"the tokenizer does not give the {kind!r} text back: train it again and report this")
        n_bytes = len(text.encode("utf-8"))
        n_tokens = {name: len(tok.encode_array([text])[0]) for name, tok in {"ours": ours, **others}.items()}
        rows[kind] = {"bytes": n_bytes, **{name: n_bytes / n for name, n in n_tokens.items()}}
    sizes = {name: len(tok.tokens) for name, tok in {"ours": ours, **others}.items()}
    lines = [
        table(rows, sizes),
        "",
        "Bytes per token; in brackets ours against it, + is better.",
        *missing_texts,
        *missing,
    ]
    print("\n".join(lines))
    metrics: dict[str, Any] = {"vocab_size": ours.vocab_size}
    for kind, row in rows.items():
        for name in sizes:
            metrics[f"{kind}_bytes_per_token" if name == "ours" else f"{kind}_{name}"] = round(row[name], 4)
    log_stage("tokenizer_evaluation", metrics, text="\n".join(lines))


def table(rows: dict[str, dict[str, float]], sizes: dict[str, int]) -> str:
    """A Markdown table: kinds of text down, vocabularies across."""
    head = ["text", "bytes", *(f"{name} ({size})" for name, size in sizes.items())]
    cells = [head, ["---", "---:", *("---:" for _ in sizes)]]
    for kind, row in rows.items():
        mine = row["ours"]
        others = [f"{row[n]:.3f} ({100 * (mine / row[n] - 1):+.1f}%)" for n in sizes if n != "ours"]
        cells.append([kind, str(int(row["bytes"])), f"{mine:.3f}", *others])
    widths = [max(len(r[i]) for r in cells) for i in range(len(head))]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) + " |" for r in cells)


def load_texts(data: Path | None, max_chars: int) -> tuple[dict[str, str], list[str]]:
    """-> ({kind: text}, lines saying what is left out or replaced)."""
    texts, notes = {}, []
    for split in ("train", "val"):
        try:
            texts[split] = "\n".join(islice(iter_documents(split), 200))[:max_chars]
        except UserError as e:
            notes.append(f"No {split} row: {e}")
    readers = {"english": lambda f: f.read(), "math": _gsm8k, "multilingual": _udhr}
    for kind, name in DATA_FILES.items():
        path = data / name if data else None
        if path and path.is_file():
            texts[kind] = _read(path, readers[kind])[:max_chars]
        else:
            texts[kind] = EMBEDDED[kind]
            notes.append(f"{kind}: a short built-in sample, as {name} is not in the data folder (NANOCHAT_DATA)")
    stdlib = Path(sysconfig.get_path("stdlib"))
    sources = [stdlib / f for f in CODE_FILES if (stdlib / f).is_file()]
    texts["code"] = "\n".join(f.read_text(encoding="utf-8") for f in sources)[:max_chars]
    texts["numbers"] = _numbers()[:max_chars]
    return {kind: text for kind, text in texts.items() if text}, notes


def load_vocabularies(data: Path | None) -> tuple[dict[str, Tokenizer], list[str]]:
    """-> ({name: tokenizer}, lines naming the vocabularies that are not there and where they belong)."""
    folder = (data or Path("$NANOCHAT_DATA")) / "tok" / "vocab"
    patterns = (
        read_json(folder / "pattern_strings.json", "patterns") if (folder / "pattern_strings.json").is_file() else {}
    )
    found, notes = {}, []
    for name, stem in VOCABULARIES.items():
        path = next((p for p in (folder / f"{stem}.tiktoken.gz", folder / f"{stem}.tiktoken") if p.is_file()), None)
        if path is None or stem not in patterns:
            notes.append(f"{name} is not compared: put {stem}.tiktoken (or .gz) and pattern_strings.json in {folder}")
        else:
            found[name] = Tokenizer.from_ranks(read_ranks(path), patterns[stem])
    return found, notes


def read_ranks(path: Path) -> dict[bytes, int]:
    """A .tiktoken file (or .gz of one) -> {token: rank}."""
    try:
        lines = _read(path, lambda f: f.read().split("\n"))
        return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}
    except (ValueError, OSError, EOFError) as e:
        raise UserError(f"vocabulary {path} is damaged ({e}): fetch it again") from e


def _read(path: Path, reader: Callable[[Any], Any]) -> Any:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8", newline="") as f:
        return reader(f)


def _gsm8k(lines: Any) -> str:
    rows = [json.loads(line) for line in lines]
    return "\n\n".join(f"{row['question']}\n{row['answer']}" for row in rows)


def _udhr(lines: Any) -> str:
    """The head of every language, so that no script outweighs the others."""
    return "\n\n".join(json.loads(line)["text"][:2000] for line in lines)


def _numbers() -> str:
    """Sums, dates, prices and hexadecimal, the same every time."""
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 10**6, (2, 500)).tolist()
    return "\n".join(
        f"{x} + {y} = {x + y}; {x % 28 + 1}.{y % 12 + 1}.{1900 + x % 125}; ${x / 100:.2f}; {y:#x}"
        for x, y in zip(a, b, strict=True)
    )


if __name__ == "__main__":
    run_script(main)
