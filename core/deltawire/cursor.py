"""A reader's position in a job's log: pure, shared by every reader."""

from .errors import GapError


class Cursor:
    """The sequence number of the last event that a reader has.

    >>> cursor = Cursor(4)
    >>> cursor.accept(4), cursor.accept(5)
    (False, True)
    """

    def __init__(self, position: int = 0) -> None:
        self.position = position

    def accept(self, sequence_number: int, first: int | None = None) -> bool:
        """Whether this event is the next one (True, and the cursor moves) or already known (False).

        An event that stands for several begins at `first`. Raises GapError where events are missing before
        it, or where it holds some that are known and some that are not; the cursor stays.
        """
        if sequence_number <= self.position:
            return False
        if (first or sequence_number) != self.position + 1:
            raise GapError(self.position + 1, first or sequence_number)
        self.position = sequence_number
        return True

    def jump(self, sequence_number: int) -> None:
        """Moves to where a snapshot stands."""
        self.position = sequence_number
