"""Look at a knowledge base from a shell: python -m nanochat.retrieval FOLDER info | verify | compact | search QUERY"""

import json

from nanochat.common import run_script
from nanochat.config import UserError
from nanochat.retrieval.kb import KnowledgeBase

USAGE = "usage: python -m nanochat.retrieval FOLDER info | verify | compact | search QUERY"


def main(argv: list[str]) -> None:
    match argv:
        case [path, "info"]:
            kb = KnowledgeBase.open(path)
            shown = ("version", "retriever", "chunking", "counts", "indexes")
            print(json.dumps({key: kb.manifest[key] for key in shown}, indent=1, ensure_ascii=False))
        case [path, "verify"]:
            kb = KnowledgeBase.open(path)
            kb.verify()
            print(f"{path}: version {kb.version}, {len(kb):,} documents, every file as it was written")
        case [path, "compact"]:
            kb = KnowledgeBase.open(path)
            kb.compact(progress=True)
            print(f"{path}: version {kb.version}, {len(kb):,} documents in {kb.n_chunks:,} chunks")
        case [path, "search", *words]:
            for hit in KnowledgeBase.open(path).search(" ".join(words)):
                title = hit.document.title or hit.document.id
                print(f"{hit.rank:2d}  {hit.score:8.3f}  {title}: {' '.join(hit.chunk.text.split())[:100]}")
        case ["-h" | "--help"]:
            print(__doc__)
        case _:
            raise UserError(USAGE)


if __name__ == "__main__":
    run_script(main)
