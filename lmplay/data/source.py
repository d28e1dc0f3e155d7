"""The base class of data sources.

To add a source, derive a class from :class:`Source`, give it a `source` name, fields and
:meth:`Source.documents`, and register it (see :mod:`lmplay.registry`).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ..schema import Strict
from .examples import Example, tokenize_examples
from .token_files import Document, Progress, Tokens, tokenize
from .tokenizers import Tokenizer

if TYPE_CHECKING:
    from ..plan import Plan


def digest(*parts: Any) -> str:
    """16 hex digits of a value that JSON can hold."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Source(Strict):
    """A plan's data set: its fields are the keys in the plan, its documents the training text.

    Errors should be :class:`lmplay.errors.LmplayError`; the harness adds the data set's name.
    """

    source: str
    """The name under which plans use it. Subclasses set a Literal and its default."""

    def documents(self) -> Iterator[Document]:
        """Yield all documents in a fixed order.

        A document is a list of pieces (text, counted). The loss counts only pieces that are
        counted.
        """
        raise NotImplementedError

    def read(self, skipped: Counter[str]) -> Iterator[Document]:
        """Yield all documents, as :meth:`documents`, and count what is left out by its reason.

        Override it instead of :meth:`documents` in sources that leave something out.
        """
        return self.documents()

    @property
    def has_labels(self) -> bool:
        """Whether it has labeled examples for a plan with `classify`."""
        return False

    def examples(self, skipped: Counter[str]) -> Iterator[Example]:
        """Yield all labeled examples in a fixed order; count what is left out by its reason."""
        raise NotImplementedError

    def announcement(self) -> str:
        """Return a sentence to print before the documents are read, such as a download's size."""
        return ""

    @property
    def fingerprint(self) -> str:
        """Changes whenever the documents change, as far as that is known without reading them."""
        return digest(self.model_dump(mode="json"))

    def tokens(self, name: str, tokenizer: Tokenizer, plan: Plan, progress: Progress) -> Tokens:
        """Return the data set's tokens, from the cache or prepared now.

        Override it for sources that are not made of documents.
        """

        def announce() -> None:
            if text := self.announcement():
                progress(f"data set {name}: {text}", None)

        def read(skipped: Counter[str]) -> Iterator[Document]:
            announce()
            return self.read(skipped)

        if plan.classify is not None:
            announce()
            return tokenize_examples(
                name, self.examples, self.fingerprint, tokenizer, plan, progress
            )
        fraction = plan.validation.fraction
        return tokenize(name, read, self.fingerprint, tokenizer, fraction, progress)

    @property
    def has_documents(self) -> bool:
        """Whether a tokenizer can be trained on it."""
        return type(self).documents is not Source.documents or type(self).read is not Source.read

    def relative_to(self, folder: Path) -> Self:
        """Return the source with its local paths made relative to a plan's folder."""
        return self

    def identity(self) -> dict[str, Any]:
        """Return what the plan's fingerprint covers: everything but where files are."""
        return self.model_dump(mode="json")

    def check_plan(self, plan: Plan) -> None:
        """Raise ValueError if the plan cannot use this source."""


class LocalSource(Source):
    """A source with a local path."""

    path: str | None = None

    def relative_to(self, folder: Path) -> Self:
        if not self.path:
            return self
        return self.model_copy(update={"path": str(folder / Path(self.path).expanduser())})

    def identity(self) -> dict[str, Any]:
        content = self.model_dump(mode="json")
        if self.path:  # content counts, not its place on a disk: the tokens have their own digest
            content["path"] = Path(self.path).name
        return content
