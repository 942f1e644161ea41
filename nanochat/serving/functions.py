"""Functions of a client ("tools" of the API): said in the system text, called through the model's own tool tokens.

Our models write Python between two special ids, and a search query between two others. What they write there is a call
of a client's function where it reads `name(argument=literal, ...)` with a name the client gave; a client's "python",
"calculator" or "search" takes whatever is written. All else the server's own tools answer. The models are not trained
on other people's functions: how often they call them is theirs to learn (scripts.chat_sft).
"""

import ast
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MAX_CALL_CHARS = 10_000
PYTHON_NAMES = ("python", "calculator")
CANNOT_READ = (SyntaxError, ValueError, TypeError, MemoryError, RecursionError)


@dataclass(frozen=True)
class FunctionCall:
    name: str
    arguments: dict[str, Any]

    @property
    def json(self) -> str:
        return json.dumps(self.arguments)


@dataclass(frozen=True)
class Function:
    name: str
    description: str
    parameters: tuple[str, ...]  # names, in the order of the schema
    types: tuple[str, ...]

    @classmethod
    def of(cls, given: dict[str, Any]) -> "Function":
        """From {"name", "description"?, "parameters"?: JSON schema}."""
        schema = given.get("parameters")
        found = schema.get("properties") if isinstance(schema, dict) else None
        properties = found if isinstance(found, dict) else {}
        types = [p.get("type") if isinstance(p, dict) else None for p in properties.values()]
        description = given.get("description")
        return cls(
            given["name"], description if isinstance(description, str) else "", tuple(properties),
            tuple(t if isinstance(t, str) else "any" for t in types),
        )  # fmt: skip

    @property
    def line(self) -> str:
        parameters = ", ".join(f"{n}: {t}" for n, t in zip(self.parameters, self.types, strict=True))
        return f"{self.name}({parameters})" + (f": {self.description}" if self.description else "")


class Functions:
    """The functions of one request."""

    def __init__(self, functions: Sequence[Function], tokenizer: Any) -> None:
        self.by_name = {f.name: f for f in functions}
        self.search_start = tokenizer.encode_special("<|search_start|>")

    @property
    def text(self) -> str:
        """What the model is told of them."""
        lines = [f.line for f in self.by_name.values()]
        return "\n".join(["You can call these functions in Python:", *lines])

    def call(self, start: int, query: str) -> FunctionCall | None:
        """The call that was written after the special id `start`, or None where it is for the server's own tool."""
        if start == self.search_start:
            return self._whole("search", query)
        called = parse_call(query, self.by_name)
        takers = [self._whole(name, query) for name in PYTHON_NAMES]
        return called or next((t for t in takers if t is not None), None)

    def _whole(self, name: str, query: str) -> FunctionCall | None:
        function = self.by_name.get(name)
        if function is None:
            return None
        return FunctionCall(name, {(function.parameters or ("query" if name == "search" else "code",))[0]: query})


def parse_call(text: str, functions: dict[str, Function]) -> FunctionCall | None:
    """`name(1, b="x")` -> the call, positions named by the function's parameters; None where it is no such call."""
    if len(text) > MAX_CALL_CHARS:
        return None
    try:
        node = ast.parse(text.strip(), mode="eval").body
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.func.id not in functions:
            return None
        names = functions[node.func.id].parameters
        arguments = dict(zip(names[: len(node.args)], map(ast.literal_eval, node.args), strict=True))
        named = {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords}
        if None in named or set(named) & set(arguments):
            return None
        arguments.update({str(name): value for name, value in named.items()})
        json.dumps(arguments, allow_nan=False)
    except CANNOT_READ:
        return None
    return FunctionCall(node.func.id, arguments)


def written(call: FunctionCall) -> str:
    """The call as the model would write it."""
    return f"{call.name}({', '.join(f'{name}={value!r}' for name, value in call.arguments.items())})"
