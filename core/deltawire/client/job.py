"""What a job's handle holds, whichever client made it. No I/O."""

from typing import Any

import msgspec

from deltawire.events import TerminalEvent

from .following import Following, job_path
from .result import Result, is_whole, result_of_event


class JobBase:
    """A job: its id, and what is known of it here."""

    def __init__(
        self,
        job_id: str,
        *,
        status: str = "unknown",
        token: str | None = None,
        urls: dict[str, str] | None = None,
        credential: str | None = None,
        renews: bool = False,
        metadata: dict[str, str] | None = None,
        response_model: type | None = None,
    ) -> None:
        self.id = job_id
        self.status = status
        """As last heard by this handle (PROTOCOL.md §2.4); `unknown` before that."""
        self.token = token
        """For a browser that is to watch the job, or cancel it (PROTOCOL.md §5.2); None: there is none."""
        paths = {"self": "", "events": "/events", "websocket": "/ws", "cancel": "/cancel"}
        self.urls = urls or {name: f"{job_path(job_id)}{path}" for name, path in paths.items()}
        """`self`, `events`, `websocket`, `cancel`; relative where the relay does not know its own address."""
        self._credential = credential  # instead of the client's
        self._renews = renews and credential is None
        self._metadata = metadata  # None: not known here
        self._response_model = response_model
        self._result: Result | None = None  # once it is known

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id} {self.status}>"

    def _following(
        self, starting_after: int = 0, *, merge: bool = False, snapshot: bool = False
    ) -> Following:
        return Following(
            self.id, starting_after=starting_after, merge=merge, snapshot=snapshot, renews=self._renews
        )

    def _ended(self, event: TerminalEvent | None) -> Result | None:
        """The result, if it is known without asking."""
        if event is None or self._metadata is None or not is_whole(event):
            return None
        return self._made(result_of_event(event, self._metadata))

    def _shown(self, job: dict[str, Any]) -> Result:
        return self._made(Result.from_job(job))

    def _made(self, result: Result) -> Result:
        self.status = result.status
        self._result = msgspec.structs.replace(result, response_model=self._response_model)
        return self._result
