"""What a model will see and what it will learn, of single records."""

from __future__ import annotations

from itertools import groupby

from transformers import PreTrainedTokenizerBase

from mftctl.data.decoding import decode_behind
from mftctl.data.encoding import Encoded
from mftctl.data.examples import IGNORED_LABEL
from mftctl.data.rendering import Segment


def trained_segments(record: Encoded, tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
    """The text of a record's tokens, cut where the labels begin and end: decoded, and so exactly what is trained on.

    The first token is never learned, since nothing comes before it to predict it from.

    Args:
        record: Token ids and labels.
        tokenizer: The one that made them.
    """
    learned = [label != IGNORED_LABEL and index > 0 for index, label in enumerate(record.labels)]
    segments, start = [], 0
    for is_answer, run in groupby(learned):
        end = start + len(list(run))
        text = decode_behind(tokenizer, record.input_ids[:start], record.input_ids[start:end])
        segments.append(Segment(text, is_answer))
        start = end
    return segments
