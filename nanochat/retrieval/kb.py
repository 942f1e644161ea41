"""A folder of documents, chunks and indexes that is searched, added to and deleted from: KnowledgeBase.

Every change makes a new version: new files first, then the manifest that names them, renamed into place. A reader sees
one whole version until it asks for the newest (`refresh`); a killed writer leaves the last one. One process writes at a
time, any number read.

Documents lie in segments, each made by one build or add and never changed. A deletion is a list of rows beside the
segment: until `compact`, term statistics still count what was deleted, as in Lucene.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

from nanochat.config import UserError
from nanochat.retrieval import manifest as manifests
from nanochat.retrieval import writer
from nanochat.retrieval.contract import Retriever
from nanochat.retrieval.document import Document, Hit
from nanochat.retrieval.snapshot import Snapshot

REMOTE = "opensearch://"
MAX_SEGMENTS = 8


class KnowledgeBase:
    """Made by `build` or `open`. Safe to search from several threads while one of them writes."""

    def __init__(self, path: Path, encoder: Any = None) -> None:
        self.path = path
        self.encoder = encoder
        self._snapshot: Snapshot | None = _newest(path, encoder)

    # ---- making and opening ----

    @staticmethod
    def build(
        documents: Iterable[Document],
        path: str | Path,
        retriever: str = "bm25",
        chunk_tokens: int = 0,
        chunk_overlap: int = 0,
        bm25: dict[str, Any] | None = None,
        dense: dict[str, Any] | None = None,
        encoder: Any = None,
        progress: bool = False,
        overwrite: bool = False,
    ) -> "KnowledgeBase":
        """Make a base of `documents` (read once, never held as a whole) at `path` and open it.

        retriever: what `search` uses by default; the indexes it needs are built, and those given options (`bm25`,
        `dense`; {} for the defaults). chunk_tokens: size of a chunk, 0 for whole documents (chunking.py). encoder: an
        object with fingerprint, dim and encode for the dense index, to be given again at every opening. progress: a
        line on stderr per step. overwrite: replace the base at `path`, which readers keep until they refresh.
        UserError for a path that holds something else, two documents of one id, or options that do not fit.
        """
        options = {"bm25": bm25, "dense": dense}
        if str(path).startswith(REMOTE):
            return _remote().build(
                documents, str(path), retriever, chunk_tokens, chunk_overlap, **options, encoder=encoder,
                progress=progress, overwrite=overwrite,
            )  # fmt: skip
        path = Path(path)
        manifest = writer.new_manifest(retriever, chunk_tokens, chunk_overlap, options, encoder)
        writer.check_target(path, overwrite)
        with manifests.writing(path):
            writer.check_target(path, overwrite)
            old = manifests.read(path) if (path / manifests.FILE).exists() else None
            manifest["version"] = old["version"] + 1 if old else 1
            writer.write_segment(path, manifest, documents, encoder, progress)
            writer.commit(path, manifest, old)
        return KnowledgeBase(path, encoder)

    @staticmethod
    def open(path: str | Path, encoder: Any = None) -> "KnowledgeBase":
        """The newest version at `path`: memory-mapped, names and sizes of its files checked (`verify` reads them).

        "opensearch://host:port/name" opens nanochat.retrieval.opensearch.OpenSearchBase, which has the same methods.
        """
        if str(path).startswith(REMOTE):
            return _remote().open(str(path), encoder)
        return KnowledgeBase(Path(path), encoder)

    # ---- searching ----

    @overload
    def search(self, queries: str, k: int = ..., retriever: str | None = ..., where: dict[str, Any] | None = ...,
               per_document: int = ..., mmr: float | None = ..., options: dict[str, Any] | None = ...
               ) -> list[Hit]: ...  # fmt: skip
    @overload
    def search(self, queries: Sequence[str], k: int = ..., retriever: str | None = ...,
               where: dict[str, Any] | None = ..., per_document: int = ..., mmr: float | None = ...,
               options: dict[str, Any] | None = ...) -> list[list[Hit]]: ...  # fmt: skip
    def search(
        self,
        queries: str | Sequence[str],
        k: int = 10,
        retriever: str | None = None,
        where: dict[str, Any] | None = None,
        per_document: int = 1,
        mmr: float | None = None,
        options: dict[str, Any] | None = None,
    ) -> list[Hit] | list[list[Hit]]:
        """The best k chunks of one query: list[Hit]; of several: list[list[Hit]].

        retriever: None is the one named at build. where: conditions on metadata (where.py). per_document: at most so
        many chunks of one document, 0 for any number. mmr: 1 ranks by score alone, less trades it for diversity (the
        order of choice is the rank then, scores stay the retriever's). options: for the retriever, e.g. {"weight": 0.3}
        for hybrid. A query without a letter or digit finds nothing.
        """
        several = [queries] if isinstance(queries, str) else list(queries)
        for query in several:
            if not isinstance(query, str):
                raise UserError(f"query {query!r} is a {type(query).__name__}, expected text")
        for name, count, least in (("k", k, 1), ("per_document", per_document, 0)):
            if type(count) is not int or count < least:
                raise UserError(f"{name}={count!r}: expected a whole number of at least {least}")
        how = (k, retriever, where, per_document, mmr, options)
        try:
            hits = self.snapshot.search(several, *how)
        except (manifests.MissingFile, FileNotFoundError):  # writers went on before this reader opened an index
            before = self.snapshot
            self.refresh()
            if self.snapshot is before:
                raise
            hits = self.snapshot.search(several, *how)
        return hits[0] if isinstance(queries, str) else hits

    def documents(self) -> Iterator[Document]:
        """All that are not deleted, in the order of their chunk ids."""
        return self.snapshot.documents()

    def get(self, id: str) -> Document | None:
        return self.snapshot.get(id)

    def __len__(self) -> int:
        return self.snapshot.n_documents

    # ---- changing ----

    def add(self, documents: Iterable[Document], replace: bool = False, progress: bool = False) -> int:
        """Add all of them in one version -> how many. An id the base has is a UserError, unless replace=True."""
        with manifests.writing(self.path):
            self.refresh()
            manifest = writer.next_version(self.manifest)
            segment = writer.write_segment(self.path, manifest, documents, self.encoder, progress)
            if segment is None:
                return 0
            writer.mark_deleted(self.snapshot, manifest, segment.ids(), refuse=not replace)
            self._commit(manifest)
            if len(self.snapshot.segments) > MAX_SEGMENTS:
                self._merge(writer.small_segments([segment.n_chunks for segment in self.snapshot.segments]), progress)
            return segment.n_documents

    def delete(self, ids: Iterable[str]) -> int:
        """Delete these documents in one version -> how many there were. Unknown ids are passed over."""
        if isinstance(ids, str):
            raise UserError(f"delete({ids!r}): expected a list of ids, [{ids!r}]")
        with manifests.writing(self.path):
            self.refresh()
            manifest = writer.next_version(self.manifest)
            count = writer.mark_deleted(self.snapshot, manifest, list(ids))
            if count:
                self._commit(manifest)
            return count

    def compact(self, progress: bool = False) -> None:
        """Rewrite all segments as one, without what was deleted."""
        with manifests.writing(self.path):
            self.refresh()
            if len(self.snapshot.segments) > 1 or any(map(len, self.snapshot.deleted)):
                self._merge(list(range(len(self.snapshot.segments))), progress)

    def _merge(self, chosen: list[int], progress: bool) -> None:
        manifest = writer.next_version(self.manifest)
        writer.merge(self.snapshot, manifest, chosen, progress)
        self._commit(manifest)

    def _commit(self, manifest: manifests.Manifest) -> None:
        writer.commit(self.path, manifest, self.manifest)
        self.refresh()

    # ---- versions ----

    def verify(self) -> None:
        """Read every file of the newest version. UserError naming the first that is missing, cut or changed."""
        self.refresh()
        try:
            manifests.check_hashes(self.path, self.manifest)
        except (manifests.MissingFile, FileNotFoundError):
            if manifests.read(self.path)["sha256"] == self.manifest["sha256"]:
                raise
            self.verify()

    def refresh(self) -> None:
        """Take the newest version."""
        self._snapshot = _newest(self.path, self.encoder, self.snapshot)

    def close(self) -> None:
        """Let go of the files."""
        self._snapshot = None

    @property
    def snapshot(self) -> Snapshot:
        """The version this base reads; it stays as it is when the base goes on."""
        if self._snapshot is None:
            raise UserError(f"{self.path} was closed: open it again")
        return self._snapshot

    @property
    def manifest(self) -> manifests.Manifest:
        return self.snapshot.manifest

    @property
    def version(self) -> int:
        return self.manifest["version"]

    # ---- contract.Base ----

    @property
    def n_chunks(self) -> int:
        """Those of deleted documents too, until the base is compacted."""
        return self.snapshot.n_chunks

    def folders(self, index: str) -> list[Path]:
        return self.snapshot.folders(index)

    def shared(self, index: str) -> Path:
        return self.snapshot.shared(index)

    def options(self, index: str) -> dict[str, Any]:
        return self.snapshot.options(index)

    def texts(self, ids: Sequence[int]) -> list[str]:
        return self.snapshot.texts(ids)

    def titles(self, ids: Sequence[int]) -> list[str]:
        return self.snapshot.titles(ids)

    def retriever(self, name: str, options: dict[str, Any] | None = None) -> Retriever:
        return self.snapshot.retriever(name, options)


def _newest(path: Path, encoder: Any, old: Snapshot | None = None) -> Snapshot:
    """A file that is missing is damage only while the manifest stays the same."""
    failed = None
    while True:
        manifest = manifests.read(path)
        if old and manifest["sha256"] == old.manifest["sha256"]:
            return old
        try:
            return Snapshot(path, manifest, encoder, old)
        except (manifests.MissingFile, FileNotFoundError):
            if failed == manifest["sha256"]:
                raise
            failed = manifest["sha256"]


def _remote() -> Any:
    from nanochat.retrieval.opensearch import OpenSearchBase  # needs the client package

    return OpenSearchBase
