"""`generate --prompt "a fox on a blue background"`: prompt to PNG. Help, lists and argument errors import no torch."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any, NoReturn

from ldm_pipe import commands
from ldm_pipe.arguments import parser
from ldm_pipe.errors import LdmError
from ldm_pipe.request import Request

# A settings field at the head of a sentence: on the command line it is a flag.
_FIELD = re.compile(r"^(steps|num_images|batch_size|height|width|seed|strength|guidance_scale|sampler|spacing)(?= is )")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code: 0 done, 2 wrong use or model, 3 the machine, 4 not finite, 70 our own
    fault, 130, 141 and 143 stopped by Ctrl-C, a closed pipe and SIGTERM; what was finished before stays."""
    debug = "--debug" in (sys.argv[1:] if argv is None else argv)
    code = 0
    previous = _on_terminate()
    try:
        code = commands.run(Request.of(vars(parser().parse_args(argv))))
        sys.stdout.flush()
    except LdmError as error:
        if debug:
            raise
        code = _say(_FIELD.sub(lambda m: f"--{m[0].replace('_', '-')}", str(error)), error.exit_code)
    except KeyboardInterrupt as stop:
        code = _say(f"interrupted; {getattr(stop, 'kept', 'nothing was finished')}", stop.args[0] if stop.args else 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing more is said to a reader who has left
        code = 128 + signal.SIGPIPE
    except OSError as error:
        if debug:
            raise
        code = _say(f"cannot write to standard output: {error.strerror or error}; images that were finished are kept", 3)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        if debug:
            raise
        code = _say(f"a fault of this program ({type(error).__name__}: {str(error)[:160]}); --debug shows where", 70)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return code


def _say(message: str, code: int) -> int:
    """One line on stderr; the exit code."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


def _on_terminate() -> dict[int, Any]:
    """SIGTERM and SIGHUP end a run as Ctrl-C does, with 128 + their number (only the main thread may say so)."""
    if threading.current_thread() is not threading.main_thread():
        return {}

    def stop(number: int, frame: Any) -> NoReturn:
        raise KeyboardInterrupt(128 + number)

    return {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}


if __name__ == "__main__":
    sys.exit(main())
