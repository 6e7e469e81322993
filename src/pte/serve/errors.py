"""Refusals in the form that clients of the OpenAI API expect.

Decides: the fields of an error's body, and which type belongs to which status. Does not know: what is refused, or why.
"""

from __future__ import annotations

import json

from fastapi import Response

SERVER_ERROR_FROM = 500


class ApiError(Exception):
    """A request that is not answered as it was asked.

    Args:
        message: Name, rule, value and remedy, as in every refusal of pte.
        status: Of the response.
        param: The field that is to blame, or None.
        code: A word for programs, or None.
        headers: Of the response.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = headers or {}

    def body(self) -> dict[str, object]:
        """The body of the response, which is also what a stream that fails half-way ends with."""
        kind = "server_error" if self.status >= SERVER_ERROR_FROM else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The refusal as a response."""
        return json_response(self.body(), status=self.status, headers=self.headers)


def json_response(content: object, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Any JSON value as a response, in ASCII, so that text which no encoding has cannot break it."""
    return Response(json.dumps(content), status_code=status, media_type="application/json", headers=headers)
