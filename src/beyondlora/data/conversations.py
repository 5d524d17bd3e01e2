"""Conversations: what the model's chat template makes of them, in stretches, each counted by the loss or not.

A message is a mapping with "role" and "content", as in transformers, or with "from" and "value", as in ShareGPT. The
loss counts what the assistant says; what opens its turn is written by the template at inference, and is not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
from jinja2 import TemplateError

Message = dict[str, Any]
Stretch = tuple[str, bool]  # text, and whether the loss counts it

ROLES_OF_SHAREGPT = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def check_conversations(rows: pa.ChunkedArray, name: str, where: str) -> None:
    """Refuse a column that holds anything but lists of messages. Raises: ValueError, with the row."""
    kind = rows.type
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if not (lists and pa.types.is_struct(kind.value_type)):
        raise ValueError(f"{where}: field {name!r} holds {kind}, expected lists of messages, {{role: …, content: …}}")
    for number, row in enumerate(rows, start=1):
        try:
            messages_of(row.as_py())
        except ValueError as error:
            raise ValueError(f"{where}, row {number}: field {name!r} holds {error}") from None


def messages_of(row: Sequence[Message] | None) -> list[Message]:
    """A row's messages by transformers' names, without what Arrow filled in. Raises: ValueError."""
    if not row:
        raise ValueError("no messages")
    messages = [{key: value for key, value in (message or {}).items() if value is not None} for message in row]
    return [_by_role(message) for message in messages]


def _by_role(message: Message) -> Message:
    if "role" in message:
        if "content" not in message and "tool_calls" not in message:
            raise ValueError(f"a message of {message['role']!r} without content")
        return message
    if "from" not in message or "value" not in message:
        raise ValueError(f"a message with {', '.join(message) or 'nothing'}; it needs role and content")
    if message["from"] not in ROLES_OF_SHAREGPT:
        known = ", ".join(ROLES_OF_SHAREGPT)
        raise ValueError(f"a message from {message['from']!r}; known are {known}. Or write role and content")
    return {"role": ROLES_OF_SHAREGPT[message["from"]], "content": message["value"]}


def stretches(tokenizer: Any, messages: Sequence[Message], where: str) -> tuple[list[Stretch], bool]:
    """A conversation as its template writes it, up to the last answer; and whether only that answer is counted.

    Templates that write an answer in another way once more is said (those of thinking models leave thoughts out) do
    not show the model the earlier answers as it would give them: of such rows the last answer counts alone.

    Raises: ValueError, with the row.
    """
    answers = [at for at, message in enumerate(messages) if message["role"] == "assistant" and at > 0]
    try:
        found = _counted(tokenizer, messages, answers)
        if found is not None:
            return found, False
        found = _counted(tokenizer, messages, answers[-1:])
    except (TemplateError, TypeError, KeyError) as error:
        raise ValueError(f"{where}: the chat template does not take this conversation: {error}") from None
    if found is None:
        raise ValueError(
            f"{where}: the chat template writes the question in another way once it is answered, so nothing tells what "
            "the answer is; name another template with chat_template_path"
        )
    return found, True


def _counted(tokenizer: Any, messages: Sequence[Message], answers: Sequence[int]) -> list[Stretch] | None:
    """The stretches around these answers; None where the template rewrites what it has written."""

    def written(count: int, **options: bool) -> str:
        text: str = tokenizer.apply_chat_template(list(messages[:count]), tokenize=False, **options)
        return text

    found, done = list[Stretch](), ""
    for at in answers:
        asked, whole = written(at), written(at + 1)
        begins = _common(written(at, add_generation_prompt=True), whole)
        if begins < len(asked) or not asked.startswith(done):
            return None
        found += [(whole[len(done) : begins], False), (whole[begins:], True)]
        done = whole
    return found


def _common(first: str, second: str) -> int:
    """How many characters two texts begin with alike."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((at for at, (one, other) in pairs if one != other), min(len(first), len(second)))
