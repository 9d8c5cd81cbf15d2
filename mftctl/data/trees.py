"""Message trees in OpenAssistant's format: one record per message, one conversation per tree."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mftctl.data.files import Record

_FIELDS = ("message_id", "parent_id", "text", "role")
_ROLES = {"prompter": "user", "assistant": "assistant"}


def is_message(record: Record) -> bool:
    """True if a record is a message of a tree."""
    return all(field in record.fields for field in _FIELDS)


def conversations(records: Sequence[Record]) -> list[Record]:
    """One conversation per tree that has an answer, following the best-ranked reply at every turn.

    Args:
        records: All messages of all trees, with `message_id`, `parent_id` (None for a root), `text`, `role`
            (prompter or assistant) and, if people ranked the replies to a message, `rank` (0 is the best).

    Returns:
        Records with `messages`, in the order of the roots, each located at its root. A final question without an
        answer is dropped.
    """
    replies: dict[str, list[Record]] = {}
    for record in records:
        if record.fields["parent_id"] is not None:
            replies.setdefault(str(record.fields["parent_id"]), []).append(record)
    found = []
    for root in records:
        if root.fields["parent_id"] is None:
            path = list(_best_path(root, replies))
            while path and path[-1].fields["role"] != "assistant":
                path.pop()
            if path:
                found.append(Record(root.where, {"messages": [_turn(message) for message in path]}))
    return found


def _best_path(root: Record, replies: dict[str, list[Record]]) -> Iterable[Record]:
    message: Record | None = root
    while message is not None:
        yield message
        # A reply belongs to one message only, so each message is taken at most once.
        answers = replies.pop(str(message.fields["message_id"]), [])
        message = min(answers, key=_rank, default=None)


def _rank(record: Record) -> float:
    rank = record.fields.get("rank")
    return float("inf") if rank is None else float(rank)


def _turn(record: Record) -> dict[str, object]:
    role = record.fields["role"]
    return {"role": _ROLES.get(role, role), "content": record.fields["text"]}
