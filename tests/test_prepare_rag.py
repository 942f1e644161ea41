"""Readers and scripts/prepare_rag_dataset: every layout, every bad row listed, nothing half written."""

import gzip
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nanochat.common import REPO_DIR
from nanochat.config import UserError
from nanochat.retrieval import Document, KnowledgeBase
from nanochat.retrieval.readers import READERS, Question, Reading
from nanochat.retrieval.readers.python_docs import first_sentence
from scripts import prepare_rag_dataset
from scripts.prepare_rag_dataset import main, prepare
from tasks.world_wording import WORDINGS

ROW_KEYS = {"id", "question", "answers", "gold_ids", "answerable"}


def read(mode: str, path: Path) -> tuple[list[Document], list[dict[str, Any]], list[dict[str, Any]], Reading]:
    """-> (documents, question rows, bad rows, the counts)"""
    listing = io.StringIO()
    reading = Reading(listing)
    items = list(READERS[mode](path, reading))
    documents = [i for i in items if isinstance(i, Document)]
    questions = [i.row for i in items if isinstance(i, Question)]
    bad = [json.loads(line) for line in listing.getvalue().splitlines()]
    assert (len(documents), len(questions), len(bad)) == (reading.documents, reading.questions, reading.bad)
    return documents, questions, bad, reading


def write_lines(path: Path, *rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() for row in rows]
    with gzip.open(path, "wb") if path.suffix == ".gz" else open(path, "wb") as f:
        f.write(b"\n".join(lines) + b"\n")
    return path


def write_json(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def run(tmp_path: Path, *argv: str, chunks: str = "--chunk_tokens=0") -> Path:
    output = tmp_path / "out"
    main([f"--output={output}", "--retriever_type=simple", chunks, *argv])
    return output


def rows_of(path: Path) -> list[dict[str, Any]]:
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def pdf_of(text: str) -> bytes:
    """A PDF of one page, small enough to write by hand."""
    stream = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET"
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        "<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R"
        " /Resources << /Font << /F1 << /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> >> >> >>",
        f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream",
    ]
    body, places = "%PDF-1.4\n", []
    for i, content in enumerate(objects, 1):
        places.append(len(body))
        body += f"{i} 0 obj\n{content}\nendobj\n"
    table = "".join(f"{place:010d} 00000 n \n" for place in places)
    end = f"trailer << /Size 5 /Root 1 0 R >>\nstartxref\n{len(body)}\n%%EOF\n"
    return (body + f"xref\n0 5\n0000000000 65535 f \n{table}" + end).encode("latin-1")


# ---- files ----


def test_files_of_every_kind_are_read_in_the_order_of_names(tmp_path: Path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes.md").write_text("intro\n\n# The Wells #\n\nDeep.", encoding="utf-8")
    (tmp_path / "a.txt").write_bytes("\ufeffGrüße\r\nfrom Ü".encode())
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"packed text"))
    (tmp_path / "d.pdf").write_bytes(pdf_of("A page about rivers."))
    (tmp_path / "e.HTML").write_text("<title>Salt &amp; sea</title><p>One<b>two</b> three<p>four", encoding="utf-8")
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    documents, questions, bad, reading = read("files", tmp_path)
    assert [(d.id, d.title, d.text) for d in documents] == [
        ("a.txt", "a", "Grüße\nfrom Ü"),
        ("b/notes.md", "The Wells", "intro\n\n# The Wells #\n\nDeep."),
        ("c.txt.gz", "c", "packed text"),
        ("d.pdf", "d", "A page about rivers."),
        ("e.HTML", "Salt & sea", "Onetwo three\nfour"),
    ]
    assert documents[3].metadata == {"pages": 1}
    assert (questions, bad, reading.notes["files of other kinds"]) == ([], [], 1)


def test_html_keeps_what_is_seen_and_the_lines_of_pre(tmp_path: Path):
    (tmp_path / "x.html").write_text(
        "<head><style>p {}</style><script>bad()</script></head><body><!-- no --><h1>Head</h1>\n"
        "<ul><li>one\n  <i>big</i> thing</li><li>two</li></ul><pre>def f():\n    return 1</pre>a<br>b"
        "<noscript><svg>no</svg></noscript></body>"
    )
    (document,), *_ = read("files", tmp_path)
    assert document.title == "x"
    assert document.text == "Head\n\none big thing\n\ntwo\n\ndef f():\n    return 1\na\n\nb"


def test_an_encoding_is_taken_from_html_that_names_it_and_from_nowhere_else(tmp_path: Path):
    text = '<meta charset="latin-1"><p>caf\u00e9'.encode("latin-1")
    (tmp_path / "named.html").write_bytes(text)
    (tmp_path / "other.html").write_bytes(text.replace(b"latin-1", b"no-such"))
    for name in ("undefined", "idna", "base64", "a\0b"):
        (tmp_path / f"other {name[0]}.html").write_bytes(text.replace(b"latin-1", name.encode()))
    (tmp_path / "plain.html").write_bytes(b"<p>caf\xe9")
    (tmp_path / "plain.txt").write_bytes(b"caf\xe9")
    documents, _, bad, _ = read("files", tmp_path)
    assert [d.text for d in documents] == ["caf\u00e9"]
    names = [f"other{name}.html" for name in (" a", " b", " i", " u", "")]
    assert [(Path(b["file"]).name, b["line"]) for b in bad] == [(n, 0) for n in (*names, "plain.html", "plain.txt")]
    assert "no-such" in bad[4]["cause"] and "0xe9 at 3" in bad[6]["cause"]


def test_unreadable_files_are_listed_and_the_others_read(tmp_path: Path):
    whole = pdf_of("text")
    for name, raw in {
        "cut.pdf": whole[: len(whole) // 2],
        "empty.pdf": b"",
        "noise.pdf": bytes(range(256)) * 20,
        "scan.pdf": pdf_of(""),
        "blank.txt": b" \n",
        "cut.txt.gz": gzip.compress(b"some text" * 100)[:-9],
        "good.txt": b"good",
    }.items():
        (tmp_path / name).write_bytes(raw)
    documents, _, bad, _ = read("files", tmp_path)
    assert "good.txt" in {d.id for d in documents}
    causes = {Path(b["file"]).name: b["cause"] for b in bad}
    assert {"empty.pdf", "noise.pdf", "scan.pdf", "blank.txt", "cut.txt.gz"} <= set(causes)
    assert "PDF" in causes["noise.pdf"] and "scan" in causes["scan.pdf"] and "no text" in causes["blank.txt"]
    assert all("\n" not in cause for cause in causes.values())


def test_deeply_nested_html_is_read(tmp_path: Path):
    (tmp_path / "deep.html").write_text("<div>" * 600 + "core" + "</div>" * 600)
    documents, _, bad, _ = read("files", tmp_path)
    assert ([d.text for d in documents], bad) == (["core"], [])


# ---- jsonl ----


def test_jsonl_documents_keep_their_metadata_and_line_separators(tmp_path: Path):
    path = write_lines(
        tmp_path / "docs.jsonl.gz",
        {"id": 7, "title": "T", "text": "one\u2028two\u0085three", "year": 1999, "metadata": {"lang": "en"}},
        b"",
        {"text": "no id"},
        {"_id": "only", "title": "A title alone", "text": ""},
    )
    documents, _, bad, _ = read("jsonl", path)
    assert documents == [
        Document("7", "one\u2028two\u0085three", "T", {"lang": "en", "year": 1999}),
        Document("docs.jsonl.gz:3", "no id"),
        Document("only", "A title alone"),
    ]
    assert bad == []


def test_jsonl_questions_bring_their_documents(tmp_path: Path):
    text = "Rain fell."
    path = write_lines(
        tmp_path / "q.jsonl",
        {"id": "d", "text": "Known."},
        {"id": 1, "question": "What fell?", "answer": "Rain", "documents": [text, {"id": "x", "text": "Other."}]},
        {"question": "Which?", "answers": ["a", "b", "a"], "documents": [{"text": text, "gold": True}, "More."]},
        {"question": "Known?", "answers": ["yes"], "gold_ids": ["d"], "kind": "mine", "hops": [{"query": "k"}]},
        {"question": "Unknown?", "answerable": False, "documents": ["Nothing."]},
    )
    documents, questions, bad, reading = read("jsonl", path)
    assert [d.text for d in documents] == ["Known.", "Rain fell.", "Other.", "More.", "Nothing."]
    rain = documents[1].id
    assert [q["gold_ids"] for q in questions] == [[rain, "x"], [rain], ["d"], []]
    assert [q["answers"] for q in questions] == [["Rain"], ["a", "b"], ["yes"], []]
    assert [q["answerable"] for q in questions] == [True, True, True, False]
    assert (questions[0]["id"], questions[2]["kind"], questions[2]["hops"]) == ("1", "mine", [{"query": "k"}])
    assert reading.notes["documents that came twice"] == 1 and bad == []
    assert len({q["id"] for q in questions}) == 4


BAD_LINES = [
    b"{",
    b"\xff\xfe{}",
    b"[1]",
    b"[" * 5000,
    {"title": "no text"},
    {"text": 5},
    {"text": "  "},
    {"id": [], "text": "x"},
    {"id": "first", "text": "not the first one's text"},
    {"text": "x", "title": 5},
    {"text": "x", "metadata": 5},
    b'{"text": "\\ud800"}',
    b'{"id": "\\ud800", "text": "x"}',
    b'{"text": "x", "metadata": {"size": NaN}}',
    b'{"text": "x", "size": [-Infinity]}',
    b'{"question": "Q12?", "answers": ["x"], "gold_ids": ["first"], "kind": "\\ud800"}',
    b'{"question": "Q13?", "answers": ["x"], "gold_ids": ["first"], "hops": [{"query": "\\ud800"}]}',
    b'{"question": "Q14?", "answers": ["x"], "gold_ids": ["\\ud800"]}',
    b'{"question": "Q15?", "answers": ["x"], "documents": [{"id": "\\ud800", "text": "x"}]}',
    b'{"id": "\\ud800", "question": "Q16?", "answers": ["x"], "gold_ids": ["first"]}',
    {"question": "", "answers": ["x"], "gold_ids": ["first"]},
    {"question": "Q1?", "gold_ids": ["first"]},
    {"question": "Q2?", "answers": 5, "gold_ids": ["first"]},
    {"question": "Q3?", "answers": ["x"]},
    {"question": "Q4?", "answers": ["x"], "gold_ids": 5},
    {"question": "Q5?", "answers": ["x"], "gold_ids": [None]},
    {"question": "Q6?", "answers": ["x"], "answerable": False},
    {"question": "Q7?", "answers": ["x"], "documents": [5]},
    {"id": "q", "question": "Q9?", "answers": ["x"], "gold_ids": ["first"]},
    {"question": "Q10?", "answers": ["x"], "gold_ids": ["first"], "kind": 5},
    *(
        {"question": "Q11?", "answers": ["x"], "gold_ids": ["first"], "hops": hops}
        for hops in (
            ["x"],
            {"query": "x"},
            "x",
            [{"query": 5}],
            [{"answer": ["x"]}],
            [{"gold_ids": "first"}],
            [{"gold_ids": [1]}],
        )
    ),
]


def test_every_bad_line_is_listed_with_its_number_and_no_other_is(tmp_path: Path):
    good = [{"id": "first", "text": "text"}, {"id": "q", "question": "Q8?", "answers": ["x"], "gold_ids": ["first"]}]
    path = write_lines(tmp_path / "x.jsonl", *good, *BAD_LINES, {"id": "last", "text": "last"})
    documents, questions, bad, _ = read("jsonl", path)
    assert [d.id for d in documents] == ["first", "last"] and [q["id"] for q in questions] == ["q"]
    assert [b["line"] for b in bad] == list(range(3, 3 + len(BAD_LINES)))
    assert all(b["file"] == str(path) and b["cause"] and "\n" not in b["cause"] for b in bad)


def test_a_file_name_that_is_no_unicode_is_a_bad_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "good.txt").write_text("good")
    Path(os.fsdecode(os.fsencode(folder / "caf") + b"\xe9.txt")).write_text("text")
    output = run(tmp_path, "--mode=files", f"--input={folder}")
    assert [row["file"] for row in rows_of(output / "bad_rows.jsonl")] == [f"{folder}/caf\udce9.txt"]
    assert r"caf\udce9.txt" in capsys.readouterr().out


def test_a_file_that_is_cut_off_or_missing_stops(tmp_path: Path):
    path = write_lines(tmp_path / "x.jsonl.gz", *[{"text": f"text {i}"} for i in range(1000)])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=re.escape(str(path))):
        read("jsonl", path)
    for mode in READERS:
        with pytest.raises(UserError, match="none"):
            read(mode, tmp_path / "none")


# ---- squad, hotpotqa, beir ----


def test_official_squad_is_read(tmp_path: Path):
    context = "The river Alph runs to the sea. It runs fast."
    qas = [
        {"id": "1", "question": " Where? ", "answers": [{"text": "the sea", "answer_start": 23}] * 2},
        {"id": "2", "question": "Why?", "answers": [], "is_impossible": True, "plausible_answers": [{"text": "fast"}]},
        {"id": "3", "question": "How?", "answers": [{"text": "slowly", "answer_start": 0}]},
        {"id": "4", "question": "Who?", "answers": []},
    ]
    article = {"title": "Alph_river", "paragraphs": [{"context": context, "qas": qas}, {"context": "", "qas": []}]}
    path = write_json(tmp_path / "dev.json", {"version": "2.0", "data": [article, {"title": "x"}]})
    documents, questions, bad, _ = read("squad", path)
    assert documents == [Document("Alph_river#0", context, "Alph river")]
    assert questions == [
        {"id": "1", "question": "Where?", "answers": ["the sea"], "gold_ids": ["Alph_river#0"], "answerable": True},
        {"id": "2", "question": "Why?", "answers": [], "gold_ids": [], "answerable": False},
    ]
    assert [b["line"] for b in bad] == [1, 1, 1, 2]
    assert "'slowly' does not stand" in bad[0]["cause"]


HOTPOT = {
    "_id": "h1",
    "question": "Q?",
    "answer": "A",
    "type": "bridge",
    "supporting_facts": [["One", 0], ["Two", 1]],
    "context": [["One", ["First.", " Second."]], ["Two", ["Third."]], ["Far", ["Else."]]],
}
HUGGING_FACE = HOTPOT | {
    "id": "h2",
    "supporting_facts": {"title": ["Two"], "sent_id": [0]},
    "context": {"title": ["Two", "One"], "sentences": [["Third."], ["Another text."]]},
}
MUSIQUE = {
    "id": "2hop__1_2",
    "question": "Who rules where X was born?",
    "answer": "Y",
    "answer_aliases": ["King Y"],
    "answerable": True,
    "question_decomposition": [
        {"question": "X >> born", "answer": "Z", "paragraph_support_idx": 1},
        {"question": "Who rules #1 ?", "answer": "Y", "paragraph_support_idx": 0},
    ],
    "paragraphs": [
        {"idx": 0, "title": "Z", "paragraph_text": "Y rules Z.", "is_supporting": True},
        {"idx": 1, "title": "X", "paragraph_text": "X is from Z.", "is_supporting": True},
        {"idx": 2, "title": "X", "paragraph_text": "Another X.", "is_supporting": False},
    ],
}


def test_hotpotqa_is_read_in_its_layouts_and_titles_are_ids(tmp_path: Path):
    flat = HOTPOT | {"_id": "h3", "context": [{"title": t, "sentences": s} for t, s in HOTPOT["context"]]}
    path = write_json(tmp_path / "hotpot.json", [HOTPOT, {"id": "h2", **HUGGING_FACE}, flat])
    documents, questions, bad, _ = read("hotpotqa", path)
    assert [(d.id, d.title, d.text) for d in documents] == [
        ("One", "One", "First. Second."),
        ("Two", "Two", "Third."),
        ("Far", "Far", "Else."),
        ("One#2", "One", "Another text."),
    ]
    assert [q["gold_ids"] for q in questions] == [["One", "Two"], ["Two"], ["One", "Two"]]
    assert [q["id"] for q in questions] == ["h1", "h2", "h3"]
    assert (questions[0]["answers"], questions[0]["kind"], bad) == (["A"], "bridge", [])


def test_openqa_finds_the_evidence_of_questions_in_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Any of the passages found that states an answer is evidence; a question without one is passed over."""
    texts = tmp_path / "texts"
    texts.mkdir()
    filler = "Nothing happens in this sentence at all, as in the others. " * 3
    (texts / "a.txt").write_text(
        f"# The mill\n\nIlse Brandt runs the mill. {filler}The mill was built in 1823. {filler}"
    )
    (texts / "b.txt").write_text("The mill is run by Ilse Brandt, not by her brother.")
    asked = [
        {"question": "who runs the mill", "answer": ["Ilse Brandt"]},
        {"id": 7, "question": "when was the mill built", "answers": ["1823", "in 1823"]},
        {"question": "who owns the weir", "answer": ["Otto"]},
        {"question": "who has no answer", "answer": []},
    ]
    questions = write_lines(tmp_path / "q.jsonl.gz", *asked)
    output = run(tmp_path, "--mode=openqa", f"--input={questions}", f"--texts={texts}", chunks="--chunk_tokens=12")
    rows = {row["question"]: row for name in ("train", "val") for row in rows_of(output / f"{name}.jsonl")}
    assert set(rows) == {"who runs the mill", "when was the mill built"}
    kb = KnowledgeBase.open(output / "knowledge_base")
    for question, row in rows.items():
        assert row["answerable"] and [hop["gold_ids"] for hop in row["hops"]] == [row["gold_ids"]]
        hits = kb.search(question, k=20)
        stating = [h.document.id for h in hits if any(answer in h.document.text for answer in row["answers"])]
        assert sorted(row["gold_ids"]) == sorted(stating) and stating
    assert len(rows["who runs the mill"]["gold_ids"]) == 2
    [built] = [kb.get(id) for id in rows["when was the mill built"]["gold_ids"]]
    assert built is not None and built.title == "The mill" and len(built.text) < 80
    assert [row["cause"][:28] for row in rows_of(output / "bad_rows.jsonl")] == ["question 'who has no answer'"]
    assert "passed over: 1 questions that no passage of the first 20 answers" in capsys.readouterr().out


def test_openqa_says_what_it_needs(tmp_path: Path):
    questions = write_lines(tmp_path / "q.jsonl", {"question": "who", "answer": ["x"]})
    openqa = [f"--output={tmp_path / 'out'}", f"--input={questions}"]
    with pytest.raises(UserError, match="--mode openqa needs --texts=PATH"):
        main(["--mode=openqa", *openqa])
    with pytest.raises(UserError, match="no other mode takes it"):
        main(["--mode=jsonl", *openqa, f"--texts={questions}"])
    with pytest.raises(UserError, match="a passage of --mode openqa needs a size"):
        main(["--mode=openqa", *openqa, f"--texts={questions}", "--chunk_tokens=0"])
    with pytest.raises(UserError, match=r"--texts=.*nowhere does not exist"):
        main(["--mode=openqa", *openqa, f"--texts={tmp_path / 'nowhere'}"])


def test_whole_documents_cannot_overlap(tmp_path: Path):
    asked = write_lines(tmp_path / "q.jsonl", {"id": "a", "text": "The mill."})
    with pytest.raises(UserError, match="chunk_overlap=5 must be less than chunk_tokens=0"):
        run(tmp_path, "--mode=jsonl", f"--input={asked}", "--chunk_overlap=5")


def test_musique_hops_name_their_documents_and_fill_in_answers(tmp_path: Path):
    unanswerable = MUSIQUE | {"id": "2hop__3", "answerable": False}
    documents, questions, bad, _ = read("hotpotqa", write_lines(tmp_path / "m.jsonl", MUSIQUE, unanswerable))
    assert [d.id for d in documents] == ["Z", "X", "X#2"] and bad == []
    assert questions[0] == {
        "id": "2hop__1_2",
        "question": MUSIQUE["question"],
        "answers": ["Y", "King Y"],
        "gold_ids": ["Z", "X"],
        "answerable": True,
        "kind": "2hop",
        "hops": [
            {"query": "X >> born", "answer": "Z", "gold_ids": ["X"]},
            {"query": "Who rules Z ?", "answer": "Y", "gold_ids": ["Z"]},
        ],
    }
    assert (questions[1]["answerable"], questions[1]["answers"], questions[1]["gold_ids"]) == (False, [], [])


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"supporting_facts": [["Nowhere", 0]]}, "'Nowhere' is not among"),
        ({"supporting_facts": []}, "without a gold document"),
        ({"supporting_facts": 5}, "supporting_facts"),
        ({"supporting_facts": [5]}, "supporting_facts"),
        ({"context": []}, "no 'context'"),
        ({"context": [["One"]]}, "expected [title"),
        ({"context": [["One", "text"]]}, "list of texts"),
        ({"context": {"title": ["One"], "sentences": []}}, "1 titles for 0"),
        ({"answer": None}, "answer"),
        ({"paragraphs": 5}, "paragraphs"),
        (MUSIQUE | {"question_decomposition": 5}, "question_decomposition"),
        (
            MUSIQUE | {"question_decomposition": [{"question": "#2?", "answer": "", "paragraph_support_idx": 0}]},
            "step 2",
        ),
        (MUSIQUE | {"question_decomposition": [{"question": "a", "answer": "b"}]}, "names paragraph None"),
    ],
)
def test_a_bad_multi_hop_row_is_listed_and_brings_no_documents(tmp_path: Path, change: dict[str, Any], cause: str):
    documents, questions, bad, _ = read("hotpotqa", write_json(tmp_path / "x.json", [{**HOTPOT, **change}, HOTPOT]))
    assert cause in bad[0]["cause"] and len(bad) == 1 and bad[0]["line"] == 1
    assert len(documents) == 3 and [q["id"] for q in questions] == ["h1"]


def beir(folder: Path, **qrels: str) -> Path:
    write_lines(folder / "corpus.jsonl.gz", *[{"_id": f"d{i}", "title": "", "text": f"text {i}"} for i in range(4)])
    write_lines(folder / "queries.jsonl", *[{"_id": f"q{i}", "text": f"query {i}", "metadata": {}} for i in range(4)])
    (folder / "qrels").mkdir()
    for name, lines in qrels.items():
        (folder / "qrels" / f"{name}.tsv").write_text("query-id\tcorpus-id\tscore\n" + lines)
    return folder


def test_beir_is_read_with_grades(tmp_path: Path):
    lines = "q1\td0\t2\nq1\td3\t1\nq1\td2\t0\nq0\td1\t1\nq9\td1\t1\nq0 d1 1\nq2\td0\t0\n"
    documents, questions, bad, reading = read("beir", beir(tmp_path, test=lines))
    assert [d.id for d in documents] == ["d0", "d1", "d2", "d3"]
    assert [(q["id"], q["question"], q["gold_ids"], q.get("relevance")) for q in questions] == [
        ("q1", "query 1", ["d0", "d3"], {"d0": 2, "d3": 1}),
        ("q0", "query 0", ["d1"], None),
    ]
    assert sorted(b["line"] for b in bad) == [6, 7, 8]
    assert reading.notes["queries without judgements"] == 1


def test_beir_splits_by_the_names_of_its_qrels(tmp_path: Path):
    source = beir(tmp_path / "in", train="q0\td0\t1\nq1\td1\t1\n", dev="q2\td2\t1\n", test="q3\td3\t1\n")
    output = run(tmp_path, "--mode=beir", f"--input={source}")
    assert [r["id"] for r in rows_of(output / "train.jsonl")] == ["q0", "q1"]
    assert [r["id"] for r in rows_of(output / "val.jsonl")] == ["q2", "q3"]


# ---- the script ----


def corpus(path: Path, n: int = 200, bad: int = 0) -> Path:
    documents = [{"id": f"d{i}", "text": f"Number {i} is here."} for i in range(n)]
    questions = [
        {"id": f"q{i}", "question": f"Where is {i}?", "answers": ["here"], "gold_ids": [f"d{i}"]} for i in range(n)
    ]
    return write_lines(path, *documents, *questions, *[{"id": f"bad{i}"} for i in range(bad)])


def test_the_output_holds_a_knowledge_base_and_two_disjoint_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output = run(tmp_path, "--mode=jsonl", f"--input={corpus(tmp_path / 'in.jsonl', bad=3)}", "--val_share=0.2")
    train, val = rows_of(output / "train.jsonl"), rows_of(output / "val.jsonl")
    assert len(train) + len(val) == 200 and 20 <= len(val) <= 60
    assert not {r["id"] for r in train} & {r["id"] for r in val}
    assert all(set(r) == ROW_KEYS for r in train + val)
    kb = KnowledgeBase.open(output / "knowledge_base")
    kb.verify()
    assert len(kb) == 200 and kb.manifest["retriever"] == "simple"
    assert all(kb.get(id) for r in train + val for id in r["gold_ids"])
    assert [b["line"] for b in rows_of(output / "bad_rows.jsonl")] == [401, 402, 403]
    made = json.loads((output / "dataset.json").read_text())
    assert (made["documents"], made["questions"], made["bad_rows"]) == (200, {"train": len(train), "val": len(val)}, 3)
    out = capsys.readouterr().out
    assert "200 documents" in out and "3 bad rows" in out and "in.jsonl:401" in out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out"]


def test_the_split_of_a_question_depends_on_its_id_alone(tmp_path: Path):
    first = run(tmp_path / "a", "--mode=jsonl", f"--input={corpus(tmp_path / 'a.jsonl')}")
    second = run(tmp_path / "b", "--mode=jsonl", f"--input={corpus(tmp_path / 'b.jsonl', n=50)}")
    mine = {r["id"] for r in rows_of(second / "val.jsonl")}
    assert mine == {r["id"] for r in rows_of(first / "val.jsonl")} & {f"q{i}" for i in range(50)} and mine


def test_a_question_whose_gold_document_is_missing_is_a_bad_row(tmp_path: Path):
    source = corpus(tmp_path / "in.jsonl", 20)
    with open(source, "a") as f:
        f.write(json.dumps({"id": "lost", "question": "?", "answers": ["x"], "gold_ids": ["d1", "d999"]}) + "\n")
        hops = [{"query": "?", "answer": "x", "gold_ids": ["d998"]}]
        f.write(json.dumps({"id": "hop", "question": "??", "answers": ["x"], "gold_ids": ["d1"], "hops": hops}) + "\n")
    output = run(tmp_path, "--mode=jsonl", f"--input={source}")
    assert [(b["line"], "d99" in b["cause"]) for b in rows_of(output / "bad_rows.jsonl")] == [(41, True), (42, True)]
    assert not {"lost", "hop"} & {r["id"] for s in ("train", "val") for r in rows_of(output / f"{s}.jsonl")}


@pytest.mark.parametrize(("bad", "flag"), [(11, "--max_bad=0.01"), (1, "--max_bad=0"), (51, "--max_bad=0.1")])
def test_too_many_bad_rows_stop_after_they_were_listed(tmp_path: Path, bad: int, flag: str):
    source = corpus(tmp_path / "in.jsonl", 200, bad)
    with pytest.raises(UserError, match=f"{bad} of {400 + bad} rows are bad") as e:
        run(tmp_path, "--mode=jsonl", f"--input={source}", flag)
    listed = tmp_path / "out.bad_rows.jsonl"
    assert str(listed) in str(e.value) and len(rows_of(listed)) == bad
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_an_input_without_a_good_row_is_an_error(tmp_path: Path):
    for rows in ([], [{"a": 1}], [{"question": "?", "answerable": False}]):
        with pytest.raises(UserError, match="no documents"):
            run(tmp_path, "--mode=jsonl", f"--input={write_lines(tmp_path / 'in.jsonl', *rows)}")
        assert not (tmp_path / "out").exists()


def test_documents_alone_make_a_knowledge_base_and_no_questions(tmp_path: Path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("One sentence here. " * 30)
    output = run(
        tmp_path, "--mode=files", f"--input={tmp_path / 'in'}", "--chunk_overlap=0", chunks="--chunk_tokens=20"
    )
    assert (output / "train.jsonl").read_text() == (output / "val.jsonl").read_text() == ""
    assert KnowledgeBase.open(output / "knowledge_base").n_chunks > 5


def test_an_output_that_is_there_is_kept_unless_told_to_replace_it(tmp_path: Path):
    source = corpus(tmp_path / "in.jsonl", 20)
    output = run(tmp_path, "--mode=jsonl", f"--input={source}")
    before = (output / "dataset.json").stat().st_ino
    with pytest.raises(UserError, match="--overwrite"):
        run(tmp_path, "--mode=jsonl", f"--input={source}")
    with pytest.raises(UserError, match="rows are bad"):
        run(tmp_path, "--mode=jsonl", f"--input={corpus(tmp_path / 'bad.jsonl', 20, 30)}", "--overwrite")
    assert (output / "dataset.json").stat().st_ino == before
    run(tmp_path, "--mode=jsonl", f"--input={corpus(tmp_path / 'in.jsonl', 30)}", "--overwrite")
    assert len(KnowledgeBase.open(output / "knowledge_base")) == 30
    assert not list(tmp_path.glob(".out*"))


def test_a_folder_with_other_files_is_never_replaced(tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="other files"):
        run(tmp_path, "--mode=jsonl", f"--input={corpus(tmp_path / 'in.jsonl', 5)}", "--overwrite")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "precious"


def test_a_link_stays_and_the_folder_it_names_is_replaced(tmp_path: Path):
    source = corpus(tmp_path / "in.jsonl", 5)
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to("real")
    for how in ([], ["--overwrite"]):
        run(tmp_path, "--mode=jsonl", f"--input={source}", *how)
        assert (tmp_path / "out").is_symlink() and (tmp_path / "real" / "dataset.json").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out", "real"]


def test_a_mount_point_is_refused_before_the_input_is_read(tmp_path: Path):
    with pytest.raises(UserError, match="mount point"):
        main(["--mode=jsonl", f"--input={tmp_path / 'none'}", "--output=/"])


def test_of_two_runs_at_once_the_first_to_end_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = corpus(tmp_path / "first.jsonl", 5)
    second = corpus(tmp_path / "second.jsonl", 7)

    def prepare_while_another_ends(*args: Any) -> dict[str, Any]:
        monkeypatch.undo()
        run(tmp_path, "--mode=jsonl", f"--input={first}")
        return prepare(*args)

    monkeypatch.setattr(prepare_rag_dataset, "prepare", prepare_while_another_ends)
    monkeypatch.setattr(os, "getpid", lambda: 1)  # of the run outside
    with pytest.raises(UserError, match="is there already"):
        run(tmp_path, "--mode=jsonl", f"--input={second}")
    assert len(KnowledgeBase.open(tmp_path / "out" / "knowledge_base")) == 5
    assert not list(tmp_path.glob(".out*"))


def test_a_killed_run_leaves_nothing_half_and_the_next_one_clears_up(tmp_path: Path):
    source = tmp_path / "in.jsonl"
    os.mkfifo(source)  # the run waits for rows that never come
    argv = ["-m", "scripts.prepare_rag_dataset", "--mode=jsonl", f"--input={source}", "--retriever_type=simple"]
    argv.append(f"--output={tmp_path / 'o' / 'out'}")
    process = subprocess.Popen([sys.executable, *argv], cwd=REPO_DIR)
    wait_for(lambda: list((tmp_path / "o").glob(".out.*.tmp/bad_rows.jsonl")), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "o" / "out").exists() and list((tmp_path / "o").glob(".out.*.tmp"))
    source.unlink()
    run(tmp_path / "o", "--mode=jsonl", f"--input={corpus(source, 5)}")
    assert [p.name for p in (tmp_path / "o").iterdir()] == ["out"]


def wait_for(there: Callable[[], Any], process: subprocess.Popen[Any]) -> None:
    end = time.monotonic() + 60
    while not there():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)


def test_what_a_run_killed_between_the_two_renames_left_is_put_back(tmp_path: Path):
    source = corpus(tmp_path / "in.jsonl", 5)
    output = run(tmp_path, "--mode=jsonl", f"--input={source}")
    os.replace(output, tmp_path / ".out.old")
    with pytest.raises(UserError, match="--overwrite"):
        run(tmp_path, "--mode=jsonl", f"--input={source}")
    assert len(rows_of(output / "train.jsonl")) + len(rows_of(output / "val.jsonl")) == 5


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--mode=files"], "needs --input"),
        (["--mode=world", "--input=x"], "takes no --input"),
        (["--mode=files", "--input="], "is blank"),
        (["--mode=files", "--input=x,,y"], "is blank"),
        (["--mode=world", "--output="], "is blank"),
        (["--mode=tapes", "--input=x"], "--mode=tapes"),
        (["--mode=world", "--val_share=1"], "val_share"),
        (["--mode=world", "--world_size=huge"], "world_size=huge"),
    ],
)
def test_a_mistaken_command_is_refused_before_anything_is_written(tmp_path: Path, argv: list[str], said: str):
    with pytest.raises(UserError, match=said):
        run(tmp_path, *argv)
    assert not list(tmp_path.iterdir())


# ---- example and world ----


def test_the_example_asks_about_a_world_and_about_python(tmp_path: Path):
    output = run(tmp_path, "--mode=example", "--questions=30")
    splits = {s: rows_of(output / f"{s}.jsonl") for s in ("train", "val")}
    rows = {r["question"]: r for r in splits["train"] + splits["val"]}
    join = rows["What does os.path.join do?"]
    assert join["gold_ids"] == ["python/os.path.join"] and join["answers"][0].startswith("Join two or more pathname")
    kb = KnowledgeBase.open(output / "knowledge_base")
    python = [r for r in rows.values() if r["kind"] == "python"]
    assert len(python) > 1000
    for row in python:
        document = kb.get(row["gold_ids"][0])
        assert document is not None and row["answers"][0] in " ".join(document.text.split())
        assert document.title in row["question"]
    worlds = {s: {r["id"].partition("-")[0] for r in rows if r["kind"] != "python"} for s, rows in splits.items()}
    assert worlds == {"train": {"train0"}, "val": {"val0"}}
    assert rows_of(output / "bad_rows.jsonl") == []
    assert all("0x7" not in d.text for d in kb.documents())


def test_a_world_is_the_same_for_the_same_seed(tmp_path: Path):
    flags = ["--mode=world", "--world_size=nano", "--questions=40", "--kinds=1hop,missing,conflict", "--max_facts=3"]
    first, second = run(tmp_path / "a", *flags), run(tmp_path / "b", *flags)
    other = run(tmp_path / "c", *flags, "--seed=1")
    rows = rows_of(first / "train.jsonl")
    assert len(rows) == 40 and {r["kind"] for r in rows} == {"1hop", "missing", "conflict"}
    assert all(r["answerable"] == (r["kind"] != "missing") for r in rows)
    assert rows == rows_of(second / "train.jsonl") != rows_of(other / "train.jsonl")
    assert rows_of(first / "bad_rows.jsonl") == []
    assert len(rows_of(first / "val.jsonl")) == 4


def test_a_test_world_is_told_and_asked_in_words_that_training_never_has(tmp_path: Path):
    flags = ["--mode=world", "--world_size=nano", "--questions=100", "--kinds=1hop", "--max_facts=3"]
    usual, held_out = run(tmp_path / "a", *flags), run(tmp_path / "b", *flags, "--val_world=test")
    assert rows_of(usual / "train.jsonl") == rows_of(held_out / "train.jsonl")
    rows = rows_of(held_out / "val.jsonl")
    assert len(rows) == 10 and all(id.startswith("test0") for row in rows for id in row["gold_ids"])
    for row in rows:
        asks = [re.escape(t).replace(r"\{s\}", ".+") for t in WORDINGS[row["relations"][0]].asks["test"]]
        assert any(re.fullmatch(ask, row["question"], re.IGNORECASE) for ask in asks)
    many = run(tmp_path / "m", *flags, "--wordings=many")
    assert rows_of(many / "val.jsonl") != rows_of(usual / "val.jsonl")
    with pytest.raises(UserError, match="val_world"):
        run(tmp_path / "c", "--mode=jsonl", "--input=x.jsonl", "--val_world=test")


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("Return it, e.g. that. And more.", "Return it, e.g. that."),
        ("f(x) -> y\n\nMake a good y\nout of an x. More.", "Make a good y out of an x."),
        ("no sentence at all", ""),
        ("Short.", ""),
        ("A " + "very " * 60 + "long one.", ""),
        ("f(x, [y])", ""),
    ],
)
def test_the_first_sentence_of_a_docstring(docstring: str, sentence: str):
    assert first_sentence(docstring) == sentence


# ---- real data ----


@pytest.mark.data
@pytest.mark.parametrize(
    ("mode", "name", "documents", "questions", "unanswerable"),
    [
        ("squad", "qa/squad11_dev.jsonl.gz", 420, 1924, 0),
        ("squad", "qa/squad20_dev.jsonl.gz", 212, 2047, 1014),
        ("hotpotqa", "qa/hotpot_distractor_dev100.jsonl.gz", 996, 100, 0),
        ("hotpotqa", "qa/2wiki_train.jsonl.gz", 3112, 500, 0),
        ("hotpotqa", "qa/musique_dev100.jsonl.gz", 1730, 100, 0),
        ("jsonl", "ir/hotpot500_corpus.jsonl.gz", 4937, 0, 0),
    ],
)
def test_real_sets_are_read_without_a_bad_row(
    data: Path, mode: str, name: str, documents: int, questions: int, unanswerable: int
):
    found, rows, bad, _ = read(mode, data / name)
    assert (len(found), len(rows), bad) == (documents, questions, [])
    assert sum(not r["answerable"] for r in rows) == unanswerable
    ids = {d.id for d in found}
    assert all(r["gold_ids"] and set(r["gold_ids"]) <= ids for r in rows if r["answerable"])
