"""The rule of the campaign: bad input ends in an error that names it, or is accepted and legal."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from campaign.cases import Case
from campaign.child import Ended

REFUSED, ACCEPTED, VIOLATION = "refused", "accepted", "violation"
_TRACEBACK = "Traceback (most recent call last)"
# An error that nobody reads to its end names nothing.
_LONGEST = 20_000


@dataclass(frozen=True)
class Verdict:
    """The judgment of one case.

    Attributes:
        kind: `refused`, `accepted` or `violation`.
        violations: what is wrong.
    """

    kind: str
    violations: tuple[str, ...] = ()


def judge(case: Case, ended: Ended, changed: Sequence[str]) -> Verdict:
    """Judge the end of a case.

    Args:
        changed: paths below the directory of the case that its command wrote or removed.
    """
    accepted = ended.status == 0
    wrong = list(_how_it_ended(ended))
    allowed = case.outputs if accepted else ()
    written = [path for path in changed if not any(PurePosixPath(path).is_relative_to(output) for output in allowed)]
    if written:
        wrong.append(f"{'accepted' if accepted else 'refused'}, and changed files: {', '.join(written[:5])}")
    if accepted:
        missing = [output for output in case.outputs if output not in changed]
        if missing:
            wrong.append(f"accepted, and did not write {', '.join(missing)}")
        illegal = case.why_illegal(ended.output)
        wrong += [] if illegal is None else [illegal]
    elif case.must_accept:
        wrong.append(f"refused, although its input is not bad: {_last_line(ended.output)}")
    elif not wrong or written:
        wrong += _unnamed(case, ended)
    if wrong:
        return Verdict(VIOLATION, tuple(wrong))
    return Verdict(ACCEPTED if accepted else REFUSED)


def _how_it_ended(ended: Ended) -> list[str]:
    if ended.stopped:
        return [f"still running after {ended.seconds:.0f} s"]
    if ended.status == -signal.SIGXCPU:
        return ["still computing at its limit of processor time"]
    if ended.status < 0:
        return [f"ended by signal {-ended.status}"]
    if _TRACEBACK in ended.output:
        return [f"traceback: {_last_line(ended.output)}"]
    return []


def _unnamed(case: Case, ended: Ended) -> list[str]:
    if len(ended.output) > _LONGEST:
        return [f"an error of {len(ended.output)} characters"]
    missing = [texts for texts in case.named if not any(text in ended.output for text in texts)]
    wrong = [f"the error does not contain {' or '.join(map(repr, texts))}" for texts in missing]
    unnamed = case.why_unnamed(ended.output)
    return [f"{text}: {_last_line(ended.output)}" for text in (*wrong, *([unnamed] if unnamed else []))]


def _last_line(output: str) -> str:
    lines = output.strip().splitlines()
    return lines[-1][:300] if lines else "(no output)"
