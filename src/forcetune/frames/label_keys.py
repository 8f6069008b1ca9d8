"""Which labels frames have, decided by few of them: the choice of keys for a set that is not in memory at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from forcetune.errors import InputError
from forcetune.frames.labels import (
    CANDIDATES,
    LABELS,
    LabelKeys,
    RawFrame,
    differing,
    label_under,
    may_lack,
    own_label,
)

_MOST_WITNESSES = 2000
_MOST_NAMED = 200


class Survey:
    """Frames that differ in which labels they have, one of each kind with the number that it stands for.

    What :func:`forcetune.frames.labels.choose_keys` says about :attr:`witnesses` and :attr:`files` it would say about
    all frames.

    Attributes:
        files: of all frames, in the order in which they came.
    """

    def __init__(self, asked: LabelKeys) -> None:
        self.asked = asked
        self.files: list[str] = []
        self._kinds: dict[Any, RawFrame] = {}

    @property
    def witnesses(self) -> list[RawFrame]:
        """In the order in which they came."""
        return list(self._kinds.values())

    def add(self, raws: Iterable[RawFrame]) -> None:
        """
        Raises:
            InputError: hardly two frames have the same labels.
        """
        for raw in raws:
            # frames come file after file
            if self.files[-1:] != [raw.origin.file]:
                self.files.append(raw.origin.file)
            kind = self._kind(raw)
            known = self._kinds.get(kind)
            if known is None:
                self._kinds[kind] = raw
            else:
                self._kinds[kind] = replace(known, count=known.count + raw.count)
            if len(self._kinds) > _MOST_WITNESSES:
                raise InputError(
                    f"{raw.origin}: the frames up to here have labels under more than {_MOST_WITNESSES:,} combinations "
                    "of keys; give every frame the same keys."
                )

    def _kind(self, raw: RawFrame) -> Any:
        """Frames of one kind cannot be distinguished by the choice of keys."""
        # not by file: data often come in one file per material
        facts: list[Any] = [raw.moved, raw.stale]
        for label, asked in zip(LABELS, self.asked, strict=True):
            keys = list(dict.fromkeys((*CANDIDATES[label], *((asked,) if asked else ()))))
            present = [key for key in keys if label_under(raw, label, key) is not None]
            label_keys = [key for key in keys if own_label(raw, label, key) is not None]
            facts += [tuple(present), tuple(label_keys), may_lack(raw, label), differing(label, present, raw)]
        # names are for a listing in a message; of very many the first will do
        named = tuple(sorted(raw.named)), tuple(sorted(raw.results))
        return (*facts, named if len(self._kinds) < _MOST_NAMED else None)


def survey_labels(raws: Sequence[RawFrame], asked: LabelKeys) -> list[RawFrame]:
    """The witnesses of some frames."""
    survey = Survey(asked)
    survey.add(raws)
    return survey.witnesses
