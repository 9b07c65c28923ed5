"""Turn the error of a lost or silent rank into one line that says what happened and how to go on."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from transpixeler.config.sections import Fault

GLOO = "gloo/transport"  # in the text of its errors, which are plain RuntimeErrors


class LostContact(Fault):
    """Another rank ended or does not answer."""


@contextmanager
def naming_lost_ranks(timeout: timedelta, way_on: Callable[[], str] = str) -> Iterator[None]:
    """Raise `LostContact` in place of an error that a lost rank causes. way_on: return a hint on how to go on."""
    try:
        yield
    except RuntimeError as error:
        if not is_lost_contact(error):
            raise
        hint = way_on()
        raise LostContact(f"{_cause(str(error), timeout)}{f'; {hint}' if hint else ''}") from error


def is_lost_contact(error: BaseException) -> bool:
    """Tell whether an error of torch's says that another rank is not there."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and GLOO in str(error))


def _cause(said: str, timeout: timedelta) -> str:
    limit = f"parallel.timeout_minutes={timeout.total_seconds() / 60:g}"
    host = socket.gethostname()
    if not re.search("time(d )?out", said, re.IGNORECASE):
        return f"on {host}: another rank has ended; the cause is in its own output ({limit} plays no part)"
    waited = re.search(r"(\d+) ?(?:ms|milliseconds)", said)
    seconds = int(waited[1]) / 1000 if waited else timeout.total_seconds()
    return f"on {host}: another rank has not answered for {seconds:.0f} s, which is the limit that {limit} sets"
