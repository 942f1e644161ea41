"""How the next version of a knowledge base is made; all of it under manifest.writing.

`write_segment`, `mark_deleted` and `merge` write files and note them in a manifest not yet in force; `commit` puts it
in force.
"""

import copy
import itertools
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nanochat.common import atomic_write, sha256_file
from nanochat.config import UserError
from nanochat.retrieval import manifest as manifests
from nanochat.retrieval.chunking import check_chunking
from nanochat.retrieval.document import Document
from nanochat.retrieval.manifest import Manifest
from nanochat.retrieval.registry import index_class, retriever_class
from nanochat.retrieval.snapshot import ENCODED, Snapshot, index_options
from nanochat.retrieval.store import Segment, Texts, seal, write_documents


def new_manifest(
    retriever: str, chunk_tokens: int, chunk_overlap: int, options: dict[str, dict[str, Any] | None], encoder: Any
) -> Manifest:
    """Of a base without a document. options: per index; None for what is built only where the retriever needs it."""
    check_chunking(chunk_tokens, chunk_overlap)
    needed = retriever_class(retriever).needs
    indexes = {
        name: {"options": dict(given or {})} for name, given in options.items() if given is not None or name in needed
    }
    if encoder is not None:
        if ENCODED not in indexes:
            raise UserError(f"encoder is given, but retriever {retriever!r} needs no vectors: add {ENCODED}={{}}")
        indexes[ENCODED]["options"] |= {"encoder": "given", "fingerprint": encoder.fingerprint}
    return {
        "format": manifests.FORMAT,
        "version": 0,
        "retriever": retriever,
        "chunking": {"chunk_tokens": chunk_tokens, "chunk_overlap": chunk_overlap},
        "indexes": indexes,
        "segments": [],
        "shared": {"name": None, "files": {}},
    }


def check_target(path: Path, overwrite: bool) -> None:
    """UserError unless a base may be built at `path`: nothing there, an unfinished build, or a base to overwrite."""
    if not path.exists():
        return
    if not path.is_dir():
        raise UserError(f"{path} is a file: a knowledge base is a folder")
    names = {p.name for p in path.iterdir()}
    if manifests.FILE in names:
        manifests.read(path)
        if not overwrite:
            raise UserError(f"{path} holds a knowledge base: add to it, or build with overwrite=True")
    elif names and ".lock" not in names:
        raise UserError(f"{path} holds other files ({min(names)}): give a new folder")


def next_version(manifest: Manifest) -> Manifest:
    return copy.deepcopy(manifest) | {"version": manifest["version"] + 1}


def commit(path: Path, manifest: Manifest, old: Manifest | None) -> None:
    """Put `manifest` in force in place of `old`."""
    segments = manifest["segments"]
    deleted = sum(entry["deleted"]["count"] for entry in segments if entry["deleted"])
    manifest["counts"] = {
        "documents": sum(entry["documents"] for entry in segments) - deleted,
        "deleted": deleted,
        "chunks": sum(entry["chunks"] for entry in segments),
    }
    manifest["previous"] = manifests.units(old) if old else []
    manifests.write(path, manifest)


def write_segment(
    path: Path, manifest: Manifest, documents: Iterable[Document], encoder: Any, progress: bool
) -> Segment | None:
    """Documents, chunks and indexes of one segment, at the end of the manifest's. None where there is no document."""
    rest = iter(documents)
    if not (first := list(itertools.islice(rest, 1))):
        return None
    folder = path / "segments" / _name(manifest)
    folder.mkdir(parents=True)
    clock = _Clock(progress)
    write_documents(itertools.chain(first, rest), folder, **manifest["chunking"])
    segment = Segment(folder)
    clock.say(f"{segment.n_documents:,} documents, {segment.n_chunks:,} chunks")
    texts = Texts(segment)
    if manifest["shared"]["name"] is None:
        _prepare(path, manifest, texts, encoder, clock)
    built = {}
    for index in manifest["indexes"]:
        (folder / index).mkdir()
        options = index_options(path, manifest, index, encoder)
        built[index] = index_class(index).build(texts, folder / index, _shared(path, manifest, index), options)
        clock.say(f"index {index}: {built[index]}")
    manifest["segments"].append(
        {
            "name": folder.name,
            "documents": segment.n_documents,
            "chunks": segment.n_chunks,
            "deleted": None,
            "files": seal(folder, path),
            "indexes": built,
        }
    )
    return segment


def _prepare(path: Path, manifest: Manifest, texts: Texts, encoder: Any, clock: "_Clock") -> None:
    """What the indexes share, made of the first documents the base gets; their options as they will stay."""
    manifest["shared"]["name"] = _name(manifest)
    for index, entry in manifest["indexes"].items():
        folder = _shared(path, manifest, index)
        folder.mkdir(parents=True)
        given = index_options(path, manifest, index, encoder)
        kept = index_class(index).prepare(texts, folder, given)
        if given.get("encoder") is encoder is not None:  # objects stay out of the manifest
            kept = kept | {"encoder": "given", "fingerprint": encoder.fingerprint}
        entry["options"] = kept
        clock.say(f"index {index}: {kept}")
    if manifest["indexes"]:
        manifest["shared"]["files"] = seal(path / "shared" / _name(manifest), path)


def mark_deleted(snapshot: Snapshot, manifest: Manifest, ids: Sequence[str], refuse: bool = False) -> int:
    """Note these ids as deleted in the segments of `snapshot` -> how many were there. refuse: UserError if any was."""
    count, kept = 0, []
    for i, entry in enumerate(manifest["segments"]):
        rows = snapshot.alive_rows(i, ids) if i < len(snapshot.segments) else np.zeros(0, np.int64)
        if len(rows) and refuse:
            raise UserError(
                f"{snapshot.path} has a document {snapshot.segments[i].cell('id', int(rows[0]))!r} already "
                f"({len(rows):,} such ids): pass replace=True to put the new ones in their place"
            )
        count += len(rows)
        if len(rows):
            rows = np.union1d(snapshot.deleted[i], rows).astype(np.int32)
            entry["deleted"] = _write_rows(snapshot.path, f"deleted/{entry['name']}-{_name(manifest)}.npy", rows)
        if not entry["deleted"] or entry["deleted"]["count"] < entry["documents"]:
            kept.append(entry)
    manifest["segments"] = kept
    return count


def _write_rows(path: Path, name: str, rows: np.ndarray) -> dict[str, Any]:
    file = path / name
    with atomic_write(file) as f:
        np.save(f, rows)
    return {"count": len(rows), "file": {name: {"size": file.stat().st_size, "sha256": sha256_file(file)}}}


def merge(snapshot: Snapshot, manifest: Manifest, chosen: list[int], progress: bool) -> None:
    """Make one segment of the chosen ones, without their deleted documents, where the first of them stood."""
    alive = (d for i in chosen for d in snapshot.segments[i].documents(snapshot.alive(i)))
    write_segment(snapshot.path, manifest, alive, snapshot.encoder, progress)
    *entries, merged = manifest["segments"]
    entries[chosen[0]] = merged
    manifest["segments"] = [entry for i, entry in enumerate(entries) if i not in chosen[1:]]


def small_segments(sizes: Sequence[int]) -> list[int]:
    """Which segments to merge: the smallest two, and on while the next has at most twice what they have together.

    So a document is rewritten about log(base / add) times, and a large segment rarely.
    """
    order = sorted(range(len(sizes)), key=lambda i: sizes[i])
    chosen, total = order[:2], sizes[order[0]] + sizes[order[1]]
    for i in order[2:]:
        if sizes[i] > 2 * total:
            break
        chosen.append(i)
        total += sizes[i]
    return sorted(chosen)


def _name(manifest: Manifest) -> str:
    return f"{manifest['version']:06d}"


def _shared(path: Path, manifest: Manifest, index: str) -> Path:
    return path / "shared" / manifest["shared"]["name"] / index


class _Clock:
    """Says on stderr how long each step took."""

    def __init__(self, loud: bool) -> None:
        self.loud, self.last = loud, time.monotonic()

    def say(self, what: str) -> None:
        now = time.monotonic()
        if self.loud:
            print(f"{what} ({now - self.last:.1f} s)", file=sys.stderr)
        self.last = now
