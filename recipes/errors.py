"""The one exception a user is meant to read: what is wrong, the fix, and the exit code."""

USAGE = 2
CHECK_FAILED = 3
MACHINE = 4


class OptimError(Exception):
    """An explained failure.

    `message` says what is wrong, `fix` what to do about it; `code` is the exit code of the command:
    1 explained failure, 2 bad usage, recipe or input, 3 a check did not hold, 4 this machine lacks
    something (memory, disk, device, package).
    """

    def __init__(self, message: str, fix: str | None = None, code: int = 1) -> None:
        super().__init__(message)
        self.message = message
        self.fix = fix
        self.code = code
