"""Options of an index or a retriever, as a plain dict from a call or a manifest, checked against a frozen dataclass."""

import difflib
from dataclasses import fields
from typing import Any, TypeVar

from nanochat.config import UserError, check_types

Options = TypeVar("Options")


def read_options(cls: type[Options], options: dict[str, Any], where: str) -> Options:
    """UserError for an unknown key, a wrong type or what cls itself refuses."""
    known = [f.name for f in fields(cls)]  # pyrefly: ignore
    for key in options:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            raise UserError(f"{where}: unknown option {key!r}: {hint}")
    check_types(cls, options, where)
    return cls(**options)
