"""Conditions on metadata: {"lang": "en", "year": {">=": 2000, "<": 2010}, "tag": ["a", "b"]}; all of them must hold.

A plain value means equal, a list means any of them, a dict names operators. A document without the key does not match.
Where the document's value is itself a list, one of its elements must match ("!=": none may be equal). Values of another
type do not match: "2000" is not 2000, and true is not 1.
"""

import operator
from collections.abc import Callable
from typing import Any

from nanochat.config import UserError

ORDER: dict[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
OPERATORS = ("==", "!=", "in", *ORDER)
Test = Callable[[Any], bool]


def parse_where(where: dict[str, Any]) -> dict[str, Test]:
    """Key -> test of a document's value. UserError for an unknown operator or a value that cannot be compared."""
    if not isinstance(where, dict):
        raise UserError(f"where={where!r}: expected a dict, e.g. {{'lang': 'en', 'year': {{'>=': 2000}}}}")
    return {
        key: _all_of([_test(key, sign, value) for sign, value in _signs(key, wanted)]) for key, wanted in where.items()
    }


def _signs(key: str, wanted: Any) -> list[tuple[str, Any]]:
    if not isinstance(wanted, dict):
        return [("in", list(wanted)) if isinstance(wanted, (list, tuple, set, frozenset)) else ("==", wanted)]
    if not wanted:
        raise UserError(f"where[{key!r}] = {{}}: give an operator ({', '.join(OPERATORS)}) and a value")
    return list(wanted.items())


def _test(key: str, sign: str, value: Any) -> Test:
    """One operator on a document's value."""
    if sign not in OPERATORS:
        raise UserError(f"where[{key!r}]: unknown operator {sign!r}, choose from {', '.join(OPERATORS)}")
    if sign == "in" and not isinstance(value, (list, tuple, set, frozenset)):
        raise UserError(f"where[{key!r}]: 'in' takes a list, not {value!r}")
    for one in value if sign == "in" else [value]:
        if not (_kind(one) in ("number", "text") or (sign not in ORDER and (one is None or isinstance(one, bool)))):
            raise UserError(f"where[{key!r}]: {sign} cannot compare with {one!r}, expected a number or text")
    if sign in ORDER:
        compare = ORDER[sign]
        return lambda found: any(_kind(x) == _kind(value) and compare(x, value) for x in _elements(found))
    keys = {(_kind(one), one) for one in (value if sign == "in" else [value])}
    equal = lambda found: any(_kind(x) != "other" and (_kind(x), x) in keys for x in _elements(found))  # noqa: E731
    return (lambda found: not equal(found)) if sign == "!=" else equal


def _all_of(tests: list[Test]) -> Test:
    return lambda found: all(test(found) for test in tests)


def _elements(found: Any) -> list[Any]:
    return found if isinstance(found, list) else [found]


def _kind(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "truth"
    if isinstance(value, (int, float)):
        return "number"
    return "text" if isinstance(value, str) else "other"
