"""NLTK's sentence data, with which IFEval's checker counts sentences and words."""

from __future__ import annotations

import io

from mftctl.errors import MissingDataError

SENTENCE_DATA = "tokenizers/punkt_tab"
"""Its place in the folders that NLTK searches."""
_PACKAGE = "punkt_tab"


def fetch_sentence_data() -> None:
    """Downloads the data into NLTK's folder of the user.

    Raises:
        MissingDataError: It cannot be downloaded.
    """
    import nltk

    try:
        nltk.download(_PACKAGE, quiet=True, raise_on_error=True, print_error_to=io.StringIO())
    except (OSError, ValueError) as error:
        raise _missing("NLTK's sentence data cannot be downloaded.", str(error)) from error


def check_sentence_data() -> None:
    """Checks that the data is installed, and seeds langdetect, which is otherwise not deterministic.

    Raises:
        MissingDataError: The data is missing.
    """
    import langdetect
    import nltk

    langdetect.DetectorFactory.seed = 0
    try:
        nltk.data.find(SENTENCE_DATA)
    except LookupError as error:
        raise _missing("IFEval needs NLTK's sentence data, which is not installed.", "none") from error


def _missing(message: str, actual: str) -> MissingDataError:
    return MissingDataError(
        message,
        expected=f"{SENTENCE_DATA} in a folder that NLTK searches",
        actual=actual,
        hint="with a network, mftctl data fetch ifeval; without one, set NLTK_DATA to a folder that contains it",
    )
