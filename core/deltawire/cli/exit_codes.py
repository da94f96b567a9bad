"""What the exit code says: the same in each command. docs/cli.md has this table."""

from enum import IntEnum


class ExitCode(IntEnum):
    """`meaning` is the row of the table."""

    meaning: str

    def __new__(cls, code: int, meaning: str) -> "ExitCode":
        member = int.__new__(cls, code)
        member._value_ = code
        member.meaning = meaning
        return member

    DONE = 0, "done; of a job that was followed: it has completed"
    WRONG = 1, "`doctor` found an error, a service could not start, or deltawire has a bug"
    USAGE = 2, "the command line or a setting is wrong; nothing was done"
    FAILED = 3, "the job has failed"
    CANCELLED = 4, "the job was cancelled"
    INCOMPLETE = 5, "the job's answer is incomplete"
    REFUSED = 6, "the relay refused: the credential, the job's id, a limit"
    UNREACHABLE = 7, "the relay (`top`: Redis) cannot be reached"
    INTERRUPTED = 130, "Ctrl-C; a job that was followed goes on"
    PIPE_CLOSED = 141, "the pipe is closed, as by `head`; a job that was followed goes on"
    TERMINATED = 143, "SIGTERM; a job that was followed goes on"


OF_STATUS = {
    "completed": ExitCode.DONE,
    "failed": ExitCode.FAILED,
    "cancelled": ExitCode.CANCELLED,
    "incomplete": ExitCode.INCOMPLETE,
}
