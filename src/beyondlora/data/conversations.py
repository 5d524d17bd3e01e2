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
CHUNK = 16  # answers whose borders are looked for at once

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


class Writer:
    """A tokenizer's chat template at work.

    >>> talk = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    >>> Writer(tokenizer).stretches(talk, "row 1")
    ([("<|user|>Hello<|assistant|>", False), ("Hi<|end|>", True)], False)
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.end: str = tokenizer.eos_token or ""
        added = (str(token) for token in tokenizer.added_tokens_decoder.values())
        self.marks = tuple(filter(None, (*tokenizer.all_special_tokens, *added)))  # the tokens that no text is made of

    def stretches(self, messages: Sequence[Message], where: str) -> tuple[list[Stretch], bool]:
        """A conversation as its template writes it, up to the last answer; and whether only that answer is counted.

        Templates that write an answer in another way once more is said (those of thinking models leave thoughts out)
        do not show the model the earlier answers as it would give them: of such rows the last answer counts alone.
        Where the template does not end an answer with a token of its own, the tokenizer's end token follows the last.

        Raises: ValueError, with the row.
        """
        answers = [at for at, message in enumerate(messages) if message["role"] == "assistant" and at > 0]
        try:
            found = self._counted(messages, answers)
            last_alone = found is None
            if found is None:
                found = self._counted(messages, answers[-1:])
        except (TemplateError, TypeError, KeyError) as error:
            raise ValueError(f"{where}: the chat template does not take this conversation: {error}") from None
        if found is None:
            raise ValueError(
                f"{where}: the chat template writes the question in another way once it is answered, so nothing tells "
                "what the answer is; name another template with chat_template_path"
            )
        if found and not found[-1][0].rstrip().endswith(self.marks):
            found[-1] = (found[-1][0] + self.end, True)
        return found, last_alone

    def _counted(self, messages: Sequence[Message], answers: Sequence[int]) -> list[Stretch] | None:
        """The stretches around these answers; None where the template rewrites what it has written."""
        found = self._in_chunks(messages, answers) if len(answers) > CHUNK else None
        return self._one_by_one(messages, answers) if found is None else found

    def _in_chunks(self, messages: Sequence[Message], answers: Sequence[int]) -> list[Stretch] | None:
        """The same by some answers at a time, behind the conversation's start; None where that is not the whole's text.

        One by one, each answer has the template write all before it: the square of a conversation's length.
        """
        lead = answers[0] + 1
        try:
            found = self._one_by_one(messages, answers[:CHUNK]) or []
            for first in range(CHUNK - 1, len(answers) - 1, CHUNK - 1):  # which is the last of the chunk before, again
                part, since = answers[first : first + CHUNK], answers[first - 1] + 1
                near = [*messages[:lead], *messages[since : part[-1] + 1]]
                counted = self._one_by_one(near, [answers[0], *(at - since + lead for at in part)])
                if counted is None:
                    return None
                found[-2:] = counted[2:]
        except (TemplateError, TypeError, KeyError):  # near may be no conversation: a tool's answer without its call
            return None
        return found if "".join(text for text, _ in found) == self._written(messages[: answers[-1] + 1]) else None

    def _one_by_one(self, messages: Sequence[Message], answers: Sequence[int]) -> list[Stretch] | None:
        found, done = list[Stretch](), ""
        for at in answers:
            opened, whole = self._written(messages[:at], add_generation_prompt=True), self._written(messages[: at + 1])
            kept, asked = self._without_end(done, opened), self._without_end(self._written(messages[:at]), whole)
            begins = _common(opened, whole)
            if begins < len(asked) or not opened.startswith(kept):
                return None
            if len(kept) < len(done):
                found[-1] = (found[-1][0][: len(kept) - len(done)], True)
            found += [(whole[len(kept) : begins], False), (whole[begins:], True)]
            done = whole
        return found

    def _written(self, messages: Sequence[Message], **options: bool) -> str:
        text: str = self.tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
        return text

    def _without_end(self, text: str, before: str) -> str:
        """Without the end token that some templates put behind the last message, whichever it is."""
        return text if before.startswith(text) else text.removesuffix(self.end)


def _common(first: str, second: str) -> int:
    """How many characters two texts begin with alike."""
    alike, least = 0, min(len(first), len(second))
    while alike < least:  # by halves, which compare whole stretches at once
        middle = (alike + least + 1) // 2
        if first[alike:middle] == second[alike:middle]:
            alike = middle
        else:
            least = middle - 1
    return alike
