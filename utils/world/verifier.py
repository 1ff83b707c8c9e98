"""Mathematics beyond plain numbers, read and compared by math-verify in a process of its own, which
ends itself when that takes too long."""

import faulthandler
import json
import subprocess
import sys
import threading
import time
import warnings
from contextlib import suppress

TIME_LIMIT, ALLOWANCE, REFUND = 3.0, 10.0, 0.1  # seconds: a comparison, all, back for each
lock, verdicts, state = threading.Lock(), {}, {"left": ALLOWANCE, "process": None}


def same_mathematics(given: str, wanted: str) -> bool:
    """Whether two expressions are equal as mathematics. What takes longer than TIME_LIMIT is not,
    and nothing is once ALLOWANCE is spent: so a batch is bounded as a whole."""
    with lock:
        state["left"] = min(ALLOWANCE, state["left"] + REFUND)
        if (given, wanted) in verdicts:
            return verdicts[given, wanted]
        if state["left"] < 0.5:
            warnings.warn("mathematics took too long too often: answers are refused", stacklevel=2)
            return False
        if len(verdicts) == 100_000:
            verdicts.clear()
        process = state["process"]
        if process is None or process.poll() is not None:
            process = state["process"] = subprocess.Popen(
                [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, text=True, start_new_session=True,  # Ctrl-C is the run's
            )  # fmt: skip
            if not process.stdout.readline():
                raise RuntimeError(f"{sys.executable} {__file__}: math-verify does not start")
        begin = time.monotonic()
        with suppress(BrokenPipeError):
            request = given, wanted, min(TIME_LIMIT, state["left"])
            print(json.dumps(request), file=process.stdin, flush=True)
        verdicts[given, wanted] = (process.stdout.readline() or process.wait()) == "true\n"
        state["left"] -= time.monotonic() - begin + (process.poll() is not None)  # 1 s for another
        return verdicts[given, wanted]


def serve() -> None:
    """The process: a pair of expressions and its time limit a line on stdin, true or false on
    stdout. It ends with its parent, whose end closes stdin, and by itself at the limit, whatever it
    is doing."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify
    from sympy import Expr, FiniteSet, powdenest

    with suppress(ImportError, ValueError, OSError):  # other systems than Linux know no such limit
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))  # bytes
    rules = NormalizationConfig(malformed_operators=True, nits=True)  # its units are letters too
    read = {"extraction_config": [LatexExtractionConfig(normalization_config=rules)]}
    read |= {"fallback_mode": "no_fallback", "parsing_timeout": None}
    how = {"numeric_precision": 400, "allow_set_relation_comp": True, "timeout_seconds": None}
    print("ready", flush=True)
    for line in sys.stdin:
        *pair, limit = json.loads(line)
        faulthandler.dump_traceback_later(limit, exit=True)
        verdict = False
        with suppress(Exception):
            a, b = (parse(rf"\boxed{{{text}}}", **read)[0] for text in pair)
            some = [x for x in (a, b) if isinstance(x, Expr | FiniteSet)]
            sizes = {len(getattr(x, "_unsorted_args", "1")) for x in some}  # 1, 1, 2 is not 1, 2
            if len(sizes) < 2 or "{" in pair[0]:
                verdict = verify(b, a, **how)
                if not verdict and "sqrt" in line and "|" not in line:  # a letter there is positive
                    verdict = verify(powdenest(b, force=True), powdenest(a, force=True), **how)
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps(verdict), flush=True)


if __name__ == "__main__":
    serve()
