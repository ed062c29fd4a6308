"""Why a request is not answered, in the form that OpenAI's clients read."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
KINDS |= {429: "rate_limit_error", 500: "server_error", 503: "server_error"}


class Refused(Exception):
    """A request that is not answered: the HTTP status, a sentence, a code, the field at fault."""

    def __init__(
        self, status: int, message: str, code: str, param: str | None = None, wait: int = 0
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.wait = wait
        """Seconds after which to ask again; 0: not said."""

    @property
    def body(self) -> dict[str, Any]:
        kind = KINDS.get(self.status, "invalid_request_error")
        said = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": said}

    def response(self) -> JSONResponse:
        headers = {"Retry-After": str(self.wait)} if self.wait else {}
        return JSONResponse(self.body, self.status, headers)
