"""What environments raise, in the log of the server that hosts them.

Clients are told a line. Whoever wrote the environment needs the traceback: here it is, for the first error at
each place of the code; how often that place has failed is told at every tenfold.
"""

from __future__ import annotations

import logging
from collections import Counter

from turnwise.errors import ActionError, TurnwiseError, describe

log = logging.getLogger(__name__)

PLACES = 1000
"""That are counted; past them counting begins anew."""

_counts: Counter[tuple[str, str, int]] = Counter()


def tell(what: str, raised: BaseException) -> None:
    """Log an error, or count it.

    Args:
        what: The environment, its method, and what it raised.
        raised: That; errors of Turnwise's own are told without a traceback.
    """
    at = raised.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    file, line = ("", 0) if at is None else (at.tb_frame.f_code.co_filename, at.tb_lineno)
    if len(_counts) >= PLACES:
        _counts.clear()
    place = (type(raised).__name__, file, line)
    _counts[place] += 1
    if _counts[place] == 1:
        where = "" if isinstance(raised, TurnwiseError) else "\n" + describe(raised).rstrip()
        log.warning("%s%s", what, where)
    elif str(_counts[place]).strip("0") == "1":
        log.warning("%s (%d times so far)", what, _counts[place])


class telling:
    """Tell what an environment raises in the block; what a client does wrong is the client's to know."""

    __slots__ = ()

    def __enter__(self) -> None:
        """Nothing is needed."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        """The error passes on."""
        if isinstance(error, TurnwiseError) and not isinstance(error, ActionError):
            tell(str(error), error.__cause__ or error)
