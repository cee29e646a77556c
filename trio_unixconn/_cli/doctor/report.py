"""What the examination found.

Invariant: every figure was measured or read in this run.
"""

from __future__ import annotations

import attrs


@attrs.frozen
class Feature:
    """Something that the kernel or Python offers.

    Attributes:
      since: the first version that has it.
      works: whether it has the expected effect; None if the attempt ran out of time, which says
        nothing about the feature.
      seen: what happened when it was tried.
      otherwise: the behaviour of this library without it.
      is_core: whether the library is of little use without.
    """

    name: str
    since: str
    works: bool | None
    seen: str
    otherwise: str
    is_core: bool = False


@attrs.frozen
class Limit:
    """A number that the system sets.

    Attributes:
      value: None if it cannot be read.
      meaning: the use of the limit, or the reason why it cannot be read.
    """

    name: str
    value: int | None
    meaning: str


@attrs.frozen
class Examination:
    """Everything that was found.

    Attributes:
      versions: of the kernel, Python, and what the library needs.
    """

    versions: dict[str, str]
    features: list[Feature]
    limits: list[Limit]

    @property
    def works(self) -> bool:
        """Whether descriptors and credentials were seen to pass."""
        return all(each.works for each in self.features if each.is_core)
