"""N:M patterns: of every M consecutive weights along the inputs, N are kept. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from mftctl.errors import MaskingError

if TYPE_CHECKING:
    import torch

LARGEST_BLOCK: Final = 32
_TEXT: Final = re.compile(r"([1-9]\d?):([1-9]\d?)")


@dataclass(frozen=True, slots=True)
class Pattern:
    """An N:M pattern.

    Attributes:
        kept: N, the number of weights kept in each block, from 1 to below M.
        block: M, the number of weights in a block, at most `LARGEST_BLOCK`.
    """

    kept: int
    block: int

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """The pattern written as `N:M`.

        Raises:
            ValueError: The text is not a pattern.
        """
        found = _TEXT.fullmatch(text)
        if found is not None:
            kept, block = map(int, found.groups())
            if kept < block <= LARGEST_BLOCK:
                return cls(kept, block)
        raise ValueError(f"a pattern is N:M with N below M and M at most {LARGEST_BLOCK}, such as 2:4, not {text!r}")

    def __str__(self) -> str:
        return f"{self.kept}:{self.block}"

    @property
    def ratio(self) -> float:
        """The share of weights that is removed."""
        return 1 - self.kept / self.block

    def require_blocks(self, inputs: int, name: str | None = None) -> None:
        """Checks that a tensor divides into whole blocks.

        Args:
            inputs: Size of its input dimension.
            name: Its name.

        Raises:
            MaskingError: It does not.
        """
        if inputs % self.block:
            raise MaskingError(
                "The pattern does not divide this tensor.",
                key=name,
                expected=f"a multiple of {self.block} inputs, for the pattern {self}",
                actual=inputs,
                hint="another pattern, or other layers or projections (--target, --layers)",
            )

    def blocks(self, values: torch.Tensor, inputs_dim: int) -> torch.Tensor:
        """A view or copy of a tensor of shape `(..., inputs // block, block)`, with the inputs last.

        Args:
            values: Of a weight's shape.
            inputs_dim: Its input dimension.

        Raises:
            MaskingError: The tensor does not divide into whole blocks.
        """
        self.require_blocks(values.shape[inputs_dim])
        inputs_last = values.movedim(inputs_dim, -1)
        return inputs_last.reshape(*inputs_last.shape[:-1], -1, self.block)
