"""How a program ends: a status for scripts, one line for people, and the traceback in a log."""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from grappa_dist.console import Interrupted, Terminated

FAILED, CONFIG_ERROR, INTERRUPTED, TERMINATED = 1, 2, 130, 143
STATUSES = (
    "Exit status: 0 done, 2 a setting or an input is wrong, 143 after SIGTERM and 130 after Ctrl-C with state saved "
    "(or a line that says it is not; a second Ctrl-C stops at once, without), 1 anything else."
)


@dataclass
class Ending:
    """Turns what a program raises into its exit status."""

    log_dir: Path | None = None  # where `errors.log` takes tracebacks, once it is known and exists

    def of(self, work: Callable[[], object]) -> int:
        try:
            work()
        except ValueError as error:
            return self._failed(error, CONFIG_ERROR)
        except Exception as error:
            return self._failed(error, FAILED)
        except KeyboardInterrupt:
            return _ended("interrupted;", INTERRUPTED)
        except Interrupted as ended:
            return _ended("interrupted;" if ended.at_once else f"interrupted; {_saved(ended)},", INTERRUPTED)
        except Terminated as ended:
            return _ended(f"terminated; {_saved(ended)},", TERMINATED)
        return 0

    def _failed(self, error: Exception, status: int) -> int:
        place = ""
        if self.log_dir is not None and self.log_dir.is_dir():
            log = self.log_dir / "errors.log"
            with contextlib.suppress(OSError), open(log, "a") as file:
                traceback.print_exception(error, file=file)
                place = f" (traceback in {log})"
        print(f"error: {' '.join(str(error).split()) or type(error).__name__}{place}", file=sys.stderr)
        return status


def _saved(ended: Terminated) -> str:
    if ended.waited_s is None:
        return "state is saved"
    return f"not all jobs had saved within {ended.waited_s:g} s"


def _ended(how: str, status: int) -> int:
    print(f"{how} run the same command again to go on", file=sys.stderr)
    return status
