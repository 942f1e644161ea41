"""Knowledge bases: documents in a folder, searched by words, by vectors, by both, or in several hops.

    from nanochat.retrieval import Document, KnowledgeBase
    kb = KnowledgeBase.build([Document("1", "Ada wrote the first program.", title="Ada")], "my_base", retriever="bm25")
    for hit in kb.search("who wrote the first program", k=3):
        print(hit.rank, hit.score, hit.document.title, hit.chunk.text)

`python -m nanochat.retrieval FOLDER info` looks at one from a shell.
"""

from nanochat.retrieval.document import Chunk, Document, Hit
from nanochat.retrieval.kb import KnowledgeBase
from nanochat.retrieval.registry import INDEXES, RETRIEVERS, index_class, retriever_class

__all__ = ["INDEXES", "RETRIEVERS", "Chunk", "Document", "Hit", "KnowledgeBase", "index_class", "retriever_class"]
