"""What the gateway says: deterministic, readable text about a prompt's topic. Pure."""

import re
from collections.abc import Iterator
from hashlib import blake2b
from itertools import cycle, islice, pairwise

from msgspec import Struct

HAIKU = "Whisper of tokens,\nword by word the river fills;\nno one waits for all."

_OPENERS = (
    "Here is a short word about {topic}.",
    "Let us look at {topic} for a moment.",
    "Few things reward a slow look like {topic}.",
    "A good way into {topic} is to begin small.",
)
_MIDDLES = (
    "It starts with a single word, and the picture fills in before anyone has to ask for it.",
    "What matters arrives first, and the rest follows at its own pace.",
    "You can stop whenever you have heard enough, and nothing is lost by it.",
    "Those who come late hear the whole story from its first line, in the same order as everyone else.",
    "From a distance it is one thing; up close it is many small pieces that agree with each other.",
    "A steady rhythm does more for {topic} than a burst of speed ever could.",
)
_CLOSERS = (
    "That is the heart of {topic}: simple parts, well kept, arriving on time.",
    "So much for {topic}; ask again, and the answer will be the same.",
    "With {topic}, as with most good things, the order is half of the meaning.",
)
_UNICODE = (
    "Ein schöner Gruß: {topic}, auf Deutsch „überflüssig“ erklärt.",
    "Un café à la crème, et voilà {topic} — naïvement, déjà vu.",
    "言葉は川のように流れる、{topic}。",
    "Слово за словом растёт рассказ: {topic}.",
    "كلمة بعد كلمة، {topic}.",
    "🌊 Waves 🚀 rockets 👩‍💻 and €5 for {topic} ✨",
)

# A word with the blanks before it, a few marks, or blanks at the end: together they are any text.
_TOKEN = re.compile(r"\s*(?:[\w'-]{1,12}|[^\w\s]{1,3})|\s+")
_TOPIC = re.compile(
    r"\b(?:about|regarding|explain|describe|concerning|of|on|in)\s+([^.?!\n]+)", re.IGNORECASE
)
_ASKS_FOR_LENGTH = re.compile(r"\blong\b", re.IGNORECASE)
_ASKS_FOR_UNICODE = re.compile(r"emoji|unicode|non-ascii|utf-8", re.IGNORECASE)
_MAX_TOPIC_CHARS = 60
_MAX_CYCLE = 64
_MAX_CYCLE_BYTES = 262_144


class Speech(Struct, frozen=True):
    """`count` deltas, which are `pieces` over and over."""

    pieces: tuple[str, ...]
    count: int

    def __iter__(self) -> Iterator[str]:
        return islice(cycle(self.pieces), self.count)

    @property
    def text(self) -> str:
        return "".join(self)

    def cut_to(self, limit: int) -> "Speech":
        return Speech(self.pieces[:limit], min(self.count, limit))


def find_topic(prompt: str) -> str:
    """A few words that say what the prompt is about; "streaming" if it says nothing."""
    head = prompt[:2000]
    found = _TOPIC.search(head)
    words = (found[1] if found else re.split(r"[.?!\n]", head.strip(), maxsplit=1)[0]).split()
    topic = ""
    for word in words:
        if len(topic) + len(word) >= _MAX_TOPIC_CHARS:
            break
        topic = f"{topic} {word}".strip()
    return topic.strip("\"'`,;:()[]{}<> ") or "streaming"


def compose(prompt: str, *, variant: int = 0, unicode: bool = False) -> str:
    """A text for a prompt. The same prompt and variant (choice index) always get the same text.

    Five sentences, or sixty where the prompt asks for something long: a minute at the usual 20 words a
    second, time to reload a page, to open another one, and to press Stop.
    """
    if unicode or not prompt.isascii() or _ASKS_FOR_UNICODE.search(prompt):
        text = " ".join(_UNICODE[(variant + i) % len(_UNICODE)] for i in range(len(_UNICODE)))
        return text.replace("{topic}", find_topic(prompt))
    lowered = prompt.lower()
    if "haiku" in lowered and "streaming" in lowered and variant == 0:
        return HAIKU
    seed = int.from_bytes(blake2b(prompt.encode(), digest_size=6).digest(), "big") + variant
    count = 58 if _ASKS_FOR_LENGTH.search(prompt) else 3
    middles = [_MIDDLES[(seed + 5 * i) % len(_MIDDLES)] for i in range(count)]
    sentences = [_OPENERS[seed % len(_OPENERS)], *middles, _CLOSERS[seed % len(_CLOSERS)]]
    return " ".join(sentences).replace("{topic}", find_topic(prompt))


def tokenize(text: str) -> tuple[str, ...]:
    """Token-sized pieces, words with their leading blanks, which join to `text` again."""
    return tuple(_TOKEN.findall(text))


def say_whole(text: str, *, deltas: int | None = None, delta_bytes: int | None = None) -> Speech:
    """Exactly `text`, in at most `deltas` pieces or in pieces of at most `delta_bytes` bytes.

    A single character that is longer than `delta_bytes` is a piece of its own.
    """
    if deltas is not None:
        count = min(max(deltas, 1), len(text))
        edges = [len(text) * i // count for i in range(count + 1)] if count else [0]
        pieces = tuple(text[start:end] for start, end in pairwise(edges))
    elif delta_bytes is not None:
        pieces = tuple(_cut_by_bytes(text, delta_bytes))
    else:
        pieces = tokenize(text)
    return Speech(pieces, len(pieces))


def say_at_length(text: str, *, deltas: int | None = None, delta_bytes: int | None = None) -> Speech:
    """`text`, repeated or shortened to `deltas` pieces of exactly `delta_bytes` bytes each."""
    if delta_bytes is None:
        pieces = tokenize(text)
        if deltas is not None and deltas > len(pieces):
            pieces = tokenize(text + "\n\n")
    else:
        pieces = _fill(text, deltas, delta_bytes)
    count = len(pieces) if deltas is None else deltas
    return Speech(pieces[:count], count)


def _fill(text: str, deltas: int | None, delta_bytes: int) -> tuple[str, ...]:
    """A bounded number of pieces of exactly `delta_bytes` bytes; dots fill up what no character fits."""
    line = text.replace("\n", " ") + " "
    natural = -(-len(line.encode()) // delta_bytes)
    wanted = min(natural if deltas is None else deltas, _MAX_CYCLE, _MAX_CYCLE_BYTES // delta_bytes)
    pieces: list[str] = []
    characters = cycle(line)
    character = next(characters)
    for _ in range(max(wanted, 1)):
        piece: list[str] = []
        room = delta_bytes
        while room > 0:
            width = len(character.encode())
            if width > delta_bytes:
                character = next(characters)  # never fits
                continue
            if width > room:
                break
            piece.append(character)
            room -= width
            character = next(characters)
        pieces.append("".join(piece) + "." * room)
    return tuple(pieces)


def _cut_by_bytes(text: str, max_bytes: int) -> Iterator[str]:
    start = size = 0
    for i, character in enumerate(text):
        width = len(character.encode())
        if size and size + width > max_bytes:
            yield text[start:i]
            start, size = i, 0
        size += width
    if start < len(text):
        yield text[start:]
