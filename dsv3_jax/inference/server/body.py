"""A JSON body, taken apart field by field; whatever is wrong with it is told in the OpenAI API's form."""

from __future__ import annotations

import json
from typing import Any, NoReturn, TypeVar

_T = TypeVar("_T")
_WORDS = {str: "a string", int: "an integer", float: "a number", bool: "true or false", list: "an array",
          dict: "an object"}


class ApiError(Exception):
    """An answer that says what was wrong.

    Attributes:
      status: of HTTP.
      param: the field that was wrong, or None.
      code: the API's word for it, or None.
      headers: of the answer.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None,
                 headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers or {}

    def as_json(self) -> dict[str, Any]:
        """The API's form of an error."""
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def parse_json(body: bytes) -> Any:
    """The value that `body` spells, in UTF-8.

    Raises:
      ApiError: 400, it spells none, or text that is not Unicode.
    """
    try:
        value = json.loads(body.decode(), parse_constant=_no_number)
        if b"\\u" in body:  # half of a surrogate pair has no UTF-8, and so no tokens
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}") from error
    return value


class Fields:
    """Fields of an object, each taken once. A null stands for a field that is not there.

    Args:
      value: what should be an object.
      path: where it stands in the body.

    Raises:
      ApiError: 400, it is none.
    """

    def __init__(self, value: Any, path: str = ""):
        if not isinstance(value, dict):
            raise ApiError(400, f"{path or 'the body'} must be an object", param=path or None)
        self._left = {name: field for name, field in value.items() if field is not None}
        self._path = path

    def take(self, name: str, kind: type[_T], default: _T) -> _T:
        """A field, or what stands for it."""
        found = self.take_any(name)
        return default if found is None else self._checked(name, found, kind)

    def take_or_none(self, name: str, kind: type[_T]) -> _T | None:
        """A field that may be missing."""
        found = self.take_any(name)
        return None if found is None else self._checked(name, found, kind)

    def need(self, name: str, kind: type[_T]) -> _T:
        """A field that must be there."""
        return self._checked(name, self.need_any(name), kind)

    def take_any(self, name: str) -> Any:
        """A field of any kind; None if it is missing."""
        return self._left.pop(name, None)

    def need_any(self, name: str) -> Any:
        """A field of any kind that must be there."""
        if name not in self._left:
            self.refuse(name, "is missing", code="missing_required_parameter")
        return self._left.pop(name)

    def at_least(self, name: str, least: int) -> int | None:
        """An integer that may be missing."""
        value = self.take_or_none(name, int)
        if value is not None and value < least:
            self.refuse(name, f"({value}) must be at least {least}", code="invalid_value")
        return value

    def leave_at(self, neutral: dict[str, tuple[Any, ...]]) -> None:
        """Takes fields that are understood, but not served: only values that change nothing are let through."""
        for name, values in neutral.items():
            value = self.take_any(name)
            if value is not None and value not in values:
                allowed = " or ".join(json.dumps(each) for each in values)
                self.refuse(name, "is not supported" + (f"; leave it out or give {allowed}" if values else "; leave it "
                            "out"), code="unsupported_parameter")

    def end(self) -> None:
        """Refuses what is left: a misspelt field would change nothing, and nobody would notice."""
        for name in self._left:
            self.refuse(name, "is no parameter of this endpoint", code="unknown_parameter")

    def refuse(self, name: str, why: str, code: str | None = None) -> NoReturn:
        """Says what is wrong with a field."""
        path = f"{self._path}.{name}" if self._path else name
        raise ApiError(400, f"{path} {why}", param=path, code=code)

    def _checked(self, name: str, value: Any, kind: type[_T]) -> _T:
        if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2 ** 63:
            value = float(value)
        # To Python true and false are integers.
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            self.refuse(name, f"must be {_WORDS[kind]}", code="invalid_type")
        return value


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")
