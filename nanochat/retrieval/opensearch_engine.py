"""Talking to OpenSearch: the address in a URL, one-line errors, bulk writes that wait where a node is busy.

    opensearch://[user:password@]host[:9200][,host2:9200]/index[?tls=true]

With several hosts, a request that one does not answer goes to the next.
"""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from nanochat.config import UserError

SCHEME = "opensearch"
PORT = 9200
EXAMPLE = "opensearch://127.0.0.1:9200/my_base"
INDEX_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,199}")
TIMEOUT_S = 60.0
LONG_S = 3600.0  # for deletions and merges
BUSY = (429, 503)  # the node's queue is full; a shard is moving to another node
WAITS_S = (0.2, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # before a busy request is sent again


@dataclass(frozen=True)
class Address:
    """str() of it leaves the password out."""

    hosts: tuple[tuple[str, int], ...]
    index: str
    tls: bool = False
    user: str = ""
    password: str = field(default="", repr=False)

    @property
    def nodes(self) -> str:
        return ",".join(f"{host}:{port}" for host, port in self.hosts)

    def __str__(self) -> str:
        return f"{SCHEME}://{self.nodes}/{self.index}{'?tls=true' if self.tls else ''}"


def parse_address(url: str) -> Address:
    parts = urlsplit(url)
    login, _, nodes = parts.netloc.rpartition("@")
    user, _, password = login.partition(":")
    index, query = parts.path.strip("/"), parse_qs(parts.query)
    try:
        hosts = tuple(_host(node) for node in nodes.split(","))
    except ValueError:
        hosts = ()
    tls = query.pop("tls", ["false"])[0]
    if parts.scheme != SCHEME or not hosts or query or tls not in ("true", "false"):
        raise UserError(f"{url.replace(login, '***') if login else url} is no address of an index, expected {EXAMPLE}")
    if not INDEX_NAME.fullmatch(index):
        raise UserError(f"index {index!r}: expected small letters, digits, '.', '_' and '-', as in {EXAMPLE}")
    return Address(hosts, index, tls == "true", unquote(user), unquote(password))


def _host(node: str) -> tuple[str, int]:
    name, _, port = node.partition(":")
    if not name:
        raise ValueError(node)
    return name, int(port or PORT)


class Engine:
    """One index. Its methods raise UserError for what the network or the engine refuses."""

    def __init__(self, address: Address) -> None:
        try:
            from opensearchpy import OpenSearch
        except ImportError:
            raise UserError(f"{address} needs opensearch-py: uv pip install opensearch-py") from None
        self.address, self.index = address, address.index
        self.client = OpenSearch(
            [{"host": host, "port": port} for host, port in address.hosts],
            http_auth=(address.user, address.password) if address.user else None,
            use_ssl=address.tls,
            timeout=TIMEOUT_S,
        )

    def ask(self, call: Callable[[Any], Any]) -> Any:
        """call(the client), again after a wait where the engine is busy or a shard moves to another node."""
        from opensearchpy import exceptions

        for wait in (*WAITS_S, None):
            try:
                return call(self.client)
            except exceptions.ConnectionError as e:
                slow = isinstance(e, exceptions.ConnectionTimeout)
                why = "it took too long" if slow else "it cannot be reached; start it or mend the address"
                raise UserError(f"no answer from OpenSearch at {self.address.nodes}: {why}") from e
            except exceptions.TransportError as e:
                if e.status_code not in BUSY or wait is None:
                    raise UserError(self._refusal(e)) from e
            except Busy as e:
                if wait is None:
                    raise UserError(f"OpenSearch at {self.address.nodes} answers only in part: {e}") from e
            time.sleep(wait)
        raise AssertionError("the last round returns or raises")

    def _refusal(self, e: Any) -> str:
        where = f"OpenSearch at {self.address.nodes}"
        reason = _reason(e.info)
        if e.status_code in (401, 403):
            return f"{where} refuses this user ({reason}): opensearch://USER:PASSWORD@HOST/{self.index}"
        if "index_not_found" in str(e.error):
            return (
                f"{where} has no index {self.index!r}: KnowledgeBase.build(documents, {str(self.address)!r}) makes it"
            )
        if "knn" in reason:
            return f"{where} cannot hold vectors, its k-NN plugin is missing or refuses: {reason}"
        return f"{where} refuses ({e.status_code}): {reason}"

    def meta(self) -> dict[str, Any] | None:
        """_meta of the index's mapping; None where there is no such index."""
        if not self.ask(lambda client: client.indices.exists(index=self.index)):
            return None
        mapping = self.ask(lambda client: client.indices.get_mapping(index=self.index))
        return next(iter(mapping.values()))["mappings"].get("_meta", {})

    def search(self, bodies: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Several searches at once -> the answer of each, which never lacks a shard."""
        # term statistics of all shards together, so that scores do not depend on how many there are
        head = {"index": self.index, "search_type": "dfs_query_then_fetch", "allow_partial_search_results": False}
        lines = [line for body in bodies for line in (head, body)]

        def call(client: Any) -> list[dict[str, Any]]:
            answers = client.msearch(body=lines)["responses"]
            for answer in answers:
                if answer["status"] in BUSY:
                    raise Busy(_reason(answer))
                if "error" in answer:
                    raise UserError(f"OpenSearch at {self.address.nodes} cannot search: {_reason(answer)}")
            return answers

        return self.ask(call)

    def records(self, ids: Sequence[int]) -> dict[int, dict[str, Any]]:
        """Of the ids that exist. Sees what was written even before a refresh."""
        if not ids:
            return {}
        asked = {"ids": [str(i) for i in ids]}

        def call(client: Any) -> dict[int, dict[str, Any]]:
            found = client.mget(body=asked, index=self.index)["docs"]
            if failed := [one for one in found if "error" in one]:
                raise Busy(_reason(failed[0]))
            return {int(one["_id"]): one["_source"] for one in found if one["found"]}

        return self.ask(call)

    def count(self, query: dict[str, Any]) -> int:
        return self.ask(lambda client: _whole(client.count(index=self.index, body={"query": query})))["count"]

    def refresh(self) -> None:
        """Make what was written found by searches."""
        self.ask(lambda client: _whole(client.indices.refresh(index=self.index)))

    def delete_where(self, query: dict[str, Any]) -> None:
        self.refresh()
        how = {"body": {"query": query}, "refresh": True, "request_timeout": LONG_S}
        self.ask(lambda client: client.delete_by_query(index=self.index, **how))

    def bulk(self, operation: str, records: dict[int, dict[str, Any]]) -> list[int]:
        """operation: "create" or "index" (which overwrites) -> the ids that "create" found taken."""
        taken: list[int] = []
        for wait in (*WAITS_S, None):
            busy = {}
            for (id, record), item in zip(records.items(), self._send(operation, records), strict=True):
                if item["status"] in BUSY:
                    busy[id] = record
                elif item["status"] == 409:
                    taken.append(id)
                elif item["status"] >= 300:
                    raise UserError(f"OpenSearch refuses document {record['document']!r}: {_reason(item)}")
            if not busy:
                return taken
            if wait is not None:
                time.sleep(wait)
            records = busy
        raise UserError(f"OpenSearch at {self.address.nodes} stays too busy to write: try again later")

    def _send(self, operation: str, records: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
        lines = [line for id, record in records.items() for line in ({operation: {"_id": str(id)}}, record)]
        answer = self.ask(lambda client: client.bulk(body=lines, index=self.index))
        return [item[operation] for item in answer["items"]]


class Busy(Exception):
    """An answer without some of the shards."""


def _whole(answer: dict[str, Any]) -> dict[str, Any]:
    if answer["_shards"]["failed"]:
        raise Busy(_reason(answer["_shards"].get("failures", [{}])[0]))
    return answer


def _reason(info: Any) -> str:
    """The innermost reason of an error answer, on one line."""
    error = info.get("error", info) if isinstance(info, dict) else info
    while isinstance(error, dict):
        inner = error.get("caused_by") or error.get("root_cause") or error.get("reason") or str(error)
        error = inner[0] if isinstance(inner, list) else inner
    return " ".join(str(error).split())[:300]
