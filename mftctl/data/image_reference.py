"""An image of a record: where its bytes lie, their digest, and its pixels."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mftctl.errors import DataError
from mftctl.text import first_line

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, slots=True)
class ImageReference:
    """An image of a record: a file, or the bytes of one.

    Attributes:
        sha256: SHA-256 of the bytes of the file in hex; empty before they were read.
        path: The file; empty if the record holds the bytes.
        content: The bytes of the file, still compressed; empty for a path.
    """

    sha256: str
    path: str = ""
    content: bytes = field(default=b"", repr=False)

    def pixels(self, where: str) -> Image:
        """The image in RGB, turned as its metadata asks for.

        Args:
            where: Origin of the record, for errors.

        Raises:
            DataError: The file is missing, has changed since the data was read, or is not an image.
        """
        from PIL import Image, ImageOps

        content = self.content or read_image(Path(self.path), where)
        if self.sha256 and hashlib.sha256(content).hexdigest() != self.sha256:
            raise DataError(
                "An image has changed since the data was read.",
                path=where,
                key=self.path,
                expected=f"SHA-256 {self.sha256}",
                hint="run the command again once nothing writes to the images",
            )
        try:
            with Image.open(io.BytesIO(content)) as image:
                return ImageOps.exif_transpose(image).convert("RGB")
        except (OSError, ValueError, SyntaxError, EOFError, IndexError, Image.DecompressionBombError) as error:
            raise DataError(
                "An image cannot be decoded.",
                path=where,
                key=self.path or "images",
                expected="an image that Pillow reads, such as PNG or JPEG",
                actual=first_line(error),
                hint="remove the record, or repair the file",
            ) from error


def read_image(path: Path, where: str) -> bytes:
    """The bytes of an image file.

    Args:
        path: The file.
        where: Origin of the record, for errors.

    Raises:
        DataError: It cannot be read.
    """
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise DataError(
            "An image cannot be read.",
            path=where,
            key=str(path),
            expected="an image file; a relative path starts at the folder of the data file",
            actual=getattr(error, "strerror", None) or str(error),
        ) from error
