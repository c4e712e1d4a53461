"""The texts below the fields of a dataclass, for ``--help``."""

from __future__ import annotations

import ast
import inspect
import textwrap


def field_docs(record: type) -> dict[str, str]:
    """First lines of the string under each field of ``record``, by field; fields without one are left out."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(record))).body
    assert isinstance(definition, ast.ClassDef)
    docs = {}
    for field, text in zip(definition.body, definition.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
            and isinstance(text.value.value, str)
        ):
            docs[field.target.id] = " ".join(text.value.value.split())
    return docs
