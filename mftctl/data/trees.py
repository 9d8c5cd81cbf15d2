"""Message trees in OpenAssistant's format: one record per message, one conversation per tree."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

from mftctl.data.files import Record
from mftctl.errors import DataError

_FIELDS = ("message_id", "parent_id", "text", "role")
_ROLES = {"prompter": "user", "assistant": "assistant"}


def is_message(record: Record) -> bool:
    """True if a record is a message of a tree."""
    return all(field in record.fields for field in _FIELDS)


def resolve_trees(records: Iterator[Record | DataError], path: str) -> Iterator[Record | DataError]:
    """Messages as the conversations of their trees, other records as they are; the first record tells which.

    Of trees, all messages are read before the first conversation. A message among other records, or another record
    among messages, becomes an error.

    Args:
        records: The records of a source, and errors about records that cannot be read, which are passed on.
        path: The source, for the error.

    Raises:
        DataError: Message trees contain no answer.
    """
    for record in records:
        if isinstance(record, DataError):
            yield record
        elif is_message(record):
            yield from _conversations(chain([record], records), path)
        else:
            yield record
            yield from map(_plain, records)


def _plain(record: Record | DataError) -> Record | DataError:
    if isinstance(record, DataError) or not is_message(record):
        return record
    return DataError(
        "The record is a message of a tree, but the first record is not.",
        path=record.where,
        expected="records of one kind",
        actual=f"the fields {', '.join(_FIELDS)}",
        hint="pass message trees as a data source of their own",
    )


def _conversations(records: Iterable[Record | DataError], path: str) -> Iterator[Record | DataError]:
    messages = []
    for record in records:
        error = record if isinstance(record, DataError) else _not_a_message(record)
        if isinstance(record, Record) and error is None:
            messages.append(record)
        elif error is not None:
            yield error
    found = conversations(messages)
    if not found:
        raise DataError("The message trees contain no answer.", path=path)
    yield from found


def _not_a_message(record: Record) -> DataError | None:
    missing = [field for field in _FIELDS if field not in record.fields]
    if missing:
        return DataError(
            "The record is not a message of a tree.",
            path=record.where,
            expected=", ".join(_FIELDS),
            actual=f"no {', '.join(missing)}",
        )
    try:
        _rank(record)
    except (TypeError, ValueError):
        return DataError(
            "The rank of a message is not a number.",
            path=record.where,
            key="rank",
            expected="0, 1, 2, ...",
            actual=repr(record.fields["rank"]),
        )
    return None


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
    return float("inf") if rank is None or rank != rank else float(rank)  # pandas writes NaN for none


def _turn(record: Record) -> dict[str, object]:
    role = record.fields["role"]
    return {"role": _ROLES.get(role, role), "content": record.fields["text"]}
