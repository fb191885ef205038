"""Datasets of the Hugging Face hub as streams of documents, through the `datasets` package.

`hf://NAME[/CONFIG][:SPLIT][@REVISION]`, where NAME is `name` or `owner/name`, or the absolute path of a folder that the
package can read (parquet, json, csv). Documents are the column "text", in the dataset's own order. A dataset on the hub
is read once, up to a number of tokens, and from then on the tokens in the cache are used and nothing is asked: without
a revision, another device may find another version of it there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from braniac.model.errors import DataError
from braniac.model.file_facts import FileFacts

_PREFIX = "hf://"
_FORM = re.compile(
    r"hf://(?P<dataset>/[^:@]+|[\w.-]+(?:/[\w.-]+)?)(?:/(?P<config>[\w.-]+))?"
    r"(?::(?P<split>\w+))?(?:@(?P<revision>[\w./-]+))?"
)


def is_hub_name(text: str) -> bool:
    """Whether `text` is meant for the hub rather than a path."""
    return text.startswith(_PREFIX)


def checked_name(text: str) -> str:
    """The name itself. Raises ValueError, for pydantic, if it has not the form above."""
    if _FORM.fullmatch(text) is None:
        raise ValueError("a dataset written as hf://NAME[/CONFIG][:SPLIT][@REVISION]")
    return text


@dataclass(frozen=True, slots=True)
class HubStream:
    """One split of a dataset."""

    name: str
    tokens_max: int

    def parts(self) -> dict[str, str | None]:
        """`dataset`, `config`, `split` and `revision`, as far as the name says them."""
        found = _FORM.fullmatch(self.name)
        assert found is not None, "names are checked when settings are read"
        return found.groupdict()

    def identity(self, facts: FileFacts) -> str:
        """Its name, and of a folder on this machine the contents. Raises DataError."""
        folder, files = Path(str(self.parts()["dataset"])), {}
        if folder.is_absolute():
            try:
                found = sorted(path for path in folder.rglob("*") if path.is_file())
                files = {path.relative_to(folder).as_posix(): facts.sha256(path) for path in found}
            except OSError as error:
                raise DataError(f"{error.filename} cannot be read ({error.strerror}): check its permissions.") from None
            if not files:
                raise DataError(f"{folder} holds no files: give a folder with a dataset.")
        return json.dumps([self.name, files])

    def documents(self) -> Iterator[str]:
        """The column "text", record by record. Raises DataError."""
        try:
            import datasets
        except ImportError as error:
            raise DataError(
                f"{self.name} needs the datasets package: install it with pip install 'braniac-node[hf]'."
            ) from error
        parts = self.parts()
        try:
            records: Any = datasets.load_dataset(
                str(parts["dataset"]),
                parts["config"],
                split=parts["split"] or "train",
                revision=parts["revision"],
                streaming=True,
            )
            for record in records:
                text = record.get("text")
                if not isinstance(text, str):
                    raise DataError(f'{self.name} lacks "text": its columns are {", ".join(map(str, record))}.')
                yield text
        except DataError:
            raise
        except Exception as error:  # whatever network, formats and the package itself may raise
            why = " ".join(str(error).split())[:200]
            raise DataError(f"{self.name} cannot be streamed ({why}): check its name and the network.") from error
