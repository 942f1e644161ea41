"""Requests made up from the server's own OpenAPI: no answer is a 5xx, and each is one that the document describes.

NANOCHAT_OPENAPI_EXAMPLES says how many requests each operation gets; the fast suite gives them few.
"""

import os
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
from serving_model import make

from nanochat.engine import Engine
from nanochat.serving.app import make_app
from nanochat.serving.scheduler import Limits, Scheduler
from nanochat.serving.service import Service, Settings

schemathesis: Any = pytest.importorskip("schemathesis", reason="schemathesis is not installed (the dev group has it)")

EXAMPLES = int(os.environ.get("NANOCHAT_OPENAPI_EXAMPLES", "30"))
SETTINGS = Settings(model="tiny", default_tokens=4, max_tokens=8, max_body_bytes=20_000, request_seconds=20)
OPERATIONS = [
    "GET /v1/models", "GET /v1/models/{name}", "GET /health", "GET /stats", "GET /metrics", "POST /v1/embeddings",
    "POST /v1/completions", "POST /v1/chat/completions", "POST /chat/completions",
]  # fmt: skip
SENSIBLE = {  # what would be refused before anything else is looked at
    "model": "tiny", "temperature": 1.0, "top_k": 5, "top_p": 0.9, "min_p": None, "repetition_penalty": 1.1, "n": 2,
    "frequency_penalty": 0, "presence_penalty": None, "logit_bias": None, "response_format": None, "retrieval": None,
    "suffix": None, "best_of": None, "echo": False, "dimensions": None, "tool_choice": "auto",
    "stop": ["x"], "top_logprobs": 2,
}  # fmt: skip
CHECKS = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance",
    "response_headers_conformance",
)  # fmt: skip


def sensibly(body: dict[str, Any]) -> dict[str, Any]:
    """The same fields, with values that let the request go further; of the messages the first, as the user's."""
    body = {name: SENSIBLE.get(name, value) for name, value in body.items()}
    if isinstance(body.get("messages"), list) and body["messages"] and isinstance(body["messages"][0], dict):
        body["messages"] = [{**body["messages"][0], "role": "user"}]
    return body


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(*make(["attn", "mamba2"]))


@pytest.fixture
def schema(engine: Engine) -> Iterator[Any]:
    """Of an app that runs in this process, with its scheduler; one a test, since schemathesis ends it after each."""
    service = Service([Scheduler(engine, Limits(max_rows=8, cache_bytes=1 << 20))], SETTINGS)
    yield schemathesis.openapi.from_asgi("/openapi.json", make_app(service))
    assert not service.broken and service.health()["running"] == 0
    for scheduler in service.schedulers:
        scheduler.stop()


def test_the_document_names_every_route(schema: Any):
    found = {f"{op.ok().method.upper()} {op.ok().path}" for op in schema.get_all_operations()}
    assert found == set(OPERATIONS)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_made_up_requests_are_answered_as_documented(schema: Any, operation: str):
    method, path = operation.split()
    checks = [getattr(schemathesis.checks, name) for name in CHECKS]
    statuses = set()

    @hypothesis.settings(
        max_examples=EXAMPLES, deadline=None, database=None, derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    @hypothesis.given(case=schema[path][method].as_strategy(), sensible=hypothesis.strategies.booleans())
    def check(case: Any, sensible: bool) -> None:
        if sensible and isinstance(case.body, dict):
            case.body = sensibly(case.body)
        statuses.add(case.call_and_validate(checks=checks).status_code)

    check()
    assert (200 in statuses or "{name}" in path) and max(statuses) < 500
