"""What a completion has cost where the upstream did not say: an estimate, which says that it is one. Pure.

A token is taken for four bytes of UTF-8. OpenAI's rule of thumb is four characters of English
(help.openai.com, "What are tokens and how to count them"); other scripts take more tokens for a character,
and more bytes. What goes around each message, and before the answer, is that of OpenAI's cookbook ("How to
count tokens with tiktoken"). Expect to be off by a quarter for prose, by much more for pictures and sound.
"""

from typing import Any, Final

BYTES_PER_TOKEN: Final = 4
MESSAGE_TOKENS: Final = 3
ANSWER_TOKENS: Final = 3
# A picture of 1024 x 1024 in high detail, and any in low (OpenAI, "Images and vision"). Sound and files are
# taken for one such picture each: their size says little.
MEDIA_TOKENS: Final = 765
LOW_DETAIL_TOKENS: Final = 85
_TEXTS: Final = frozenset({"text", "refusal", "thinking"})


def estimate(request: dict[str, Any], completion: dict[str, Any] | None) -> dict[str, Any]:
    """OpenAI's usage object for a request that was asked, and what came back of it. Never raises."""
    messages = request.get("messages")
    prompt_tokens = ANSWER_TOKENS
    for message in messages if isinstance(messages, list) else ():
        prompt_tokens += MESSAGE_TOKENS + _message_tokens(message)
    # Tools and schemas go into the prompt, in a form of the model's.
    declared = [request.get(name) for name in ("tools", "functions", "response_format")]
    prompt_tokens += _tokens(_size(declared))
    choices = (completion or {}).get("choices")
    listed = choices if isinstance(choices, list) else []
    answers = [choice.get("message") for choice in listed if isinstance(choice, dict)]
    completion_tokens = sum(_answer_tokens(answer) for answer in answers if isinstance(answer, dict))
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def _message_tokens(message: Any) -> int:  # whatever JSON somebody sent
    if not isinstance(message, dict):
        return _tokens(_size(message))
    parts = message.get("content")
    if not isinstance(parts, list):
        return _tokens(_size(list(message.values())))
    tokens = _tokens(_size([value for key, value in message.items() if key != "content"]))
    for part in parts:
        if not isinstance(part, dict) or not _TEXTS.isdisjoint(part):
            tokens += _tokens(_size(list(part.values()) if isinstance(part, dict) else part))
        else:
            picture = part.get("image_url")
            is_low = isinstance(picture, dict) and picture.get("detail") == "low"
            tokens += LOW_DETAIL_TOKENS if is_low else MEDIA_TOKENS
    return tokens


def _answer_tokens(message: dict[str, Any]) -> int:
    audio = message.get("audio")
    said = [
        *(message.get(name) for name in ("content", "refusal", "tool_calls", "function_call")),
        # Some gateways say it twice, under both names.
        message.get("reasoning_content") or message.get("reasoning"),
        audio.get("transcript") if isinstance(audio, dict) else None,
    ]
    return _tokens(_size(said))


def _size(value: Any) -> int:  # JSON
    """The bytes of all texts in it, names of fields included."""
    size, left = 0, [value]
    while left:  # no recursion: requests may nest as deeply as they can be read
        item = left.pop()
        if isinstance(item, str):
            size += len(item) if item.isascii() else len(item.encode("utf-8", "replace"))
        elif isinstance(item, dict):
            left += item
            left += item.values()
        elif isinstance(item, list):
            left += item
        elif item is not None:
            size += len(str(item))
    return size


def _tokens(size: int) -> int:
    return -(-size // BYTES_PER_TOKEN)
