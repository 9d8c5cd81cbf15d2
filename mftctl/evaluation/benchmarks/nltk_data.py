"""The data with which IFEval counts sentences, which lm-eval would fetch as soon as its checker is imported."""

from __future__ import annotations

from mftctl.errors import EvaluationError


def check_sentence_data() -> None:
    """Nothing, if NLTK's sentence data is there; also makes langdetect, which draws at random, repeatable.

    Raises:
        EvaluationError: It is not.
    """
    import langdetect
    import nltk

    langdetect.DetectorFactory.seed = 0
    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError as error:
        raise EvaluationError(
            "IFEval counts sentences with data of NLTK that is not on this machine.",
            expected="tokenizers/punkt_tab in a folder that NLTK searches",
            actual="none",
            hint="python -m nltk.downloader punkt_tab, or set NLTK_DATA to a folder that has it",
        ) from error
