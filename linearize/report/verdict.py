"""What came of a conversion, in words that a reader can rely on.

The linear branches of published hybrids often carry nothing: the window does the work, and nobody switched the branch
off to see. So the branch's own gain is judged first, then the cheap baselines; only then is anything called good.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from linearize.report.schema import Gate, Result, Row, Verdict, average
from linearize.types import GateError, InputError

#: Nats per token below which a linear branch is said to do nothing; twice that on copy-from-beyond tokens.
LINEAR_GAIN = 0.01


def find(rows: Sequence[Row], *names: str) -> Row | None:
    """The first of `names` that there is a row for."""
    by_name = {row.name: row for row in rows}
    return next((by_name[name] for name in names if name in by_name), None)


def linear_gain(rows: Sequence[Row]) -> float | None:
    """Nats per token that the student loses without its linear branch; None where that was not measured."""
    student, off = find(rows, "student"), find(rows, "linear_off")
    if student is not None and student.marginal is not None:
        return student.marginal
    return _gap(student, off, "nll")


def _gap(better: Row | None, worse: Row | None, metric: str) -> float | None:
    low, high = getattr(better, metric, None), getattr(worse, metric, None)
    return None if low is None or high is None else high - low


def _ratio(student: Row | None, teacher: Row | None) -> float | None:
    gap = _gap(teacher, student, "nll")
    if gap is not None:
        return math.exp(gap)
    above, below = getattr(student, "perplexity", None), getattr(teacher, "perplexity", None)
    return above / below if above and below else None


def judge(rows: Sequence[Row], gate: Mapping[str, Any] | None = None) -> Verdict:
    """The verdict on a table of rows.

    gate: the recipe's; `linear_gain` (True, or the nats wanted) and `perplexity_ratio` (the most allowed); of encoders
    `retained`, `cosine` and `mrr` (the least). A gate whose number was not measured is missed. Looks at the rows
    teacher, student, linear_off, zero-token window, window-only student and (of encoders) none; a missing one is not
    judged. The linear branch of a language model is dead where its gain, on all tokens and on copy-from-beyond tokens,
    is below LINEAR_GAIN or not distinguishable from 0.
    """
    teacher, student = find(rows, "teacher"), find(rows, "student")
    if student is not None and student.distance is not None:
        return _drawings(rows, student, gate or {})
    if student is not None and student.cosine is not None:
        return _encoder(rows, student, gate or {})
    ratio, gain = _ratio(student, teacher), linear_gain(rows)
    copy_gain = _gap(student, find(rows, "linear_off"), "copy_nll")
    dead = _nothing(student, "marginal", gain, LINEAR_GAIN) and (
        copy_gain is None or _nothing(student, "marginal_copy", copy_gain, 2 * LINEAR_GAIN)
    )

    lines, beaten = [], []
    if gain is not None and not dead:
        on_copies = "" if copy_gain is None else f" ({copy_gain:.3f} on tokens copied from beyond the window)"
        lines.append(f"The linear branch carries {gain:.3f} nats per token{on_copies}.")
    if student is not None and student.gap_closed is not None:
        lines.append(f"{100 * student.gap_closed:.0f} % of the window-to-teacher gap is closed on copied tokens.")
    for name, words in (("zero-token window", "an untrained window"), ("window-only student", "a trained window")):
        lead = _gap(student, find(rows, name), "nll")
        if lead is None:
            continue
        if lead > 0:
            lines.append(f"{lead:.3f} nats per token better than {words}.")
        else:
            beaten.append(words)
            lines.append(f"{-lead:.3f} nats per token worse than {words}.")

    gates = _gates(gate or {}, ratio, gain, dead)
    missed = [g for g in gates if not g.passed]
    nothing = "" if gain is None else f"The linear branch does nothing: without it {gain:+.4f} nats per token are lost"
    if missed:
        level = "failed"
        headline = "Quality gate missed: " + "; ".join(_words(g) for g in missed)
        if dead:
            headline += f". {nothing}"
    elif dead:
        level, headline = "dead", nothing
    elif beaten:
        level, headline = "weak", f"No better than {' or '.join(beaten)}"
    elif ratio is None:
        level, headline = "unknown", "Not measured against its teacher"
    else:
        level, headline = "good", f"{ratio:.3g} times the teacher's perplexity"
    if level != "good" and ratio is not None:
        lines.insert(0, f"{ratio:.3g} times the teacher's perplexity.")
    return Verdict(level=level, headline=headline, lines=lines, gates=gates)


def _encoder(rows: Sequence[Row], student: Row, gate: Mapping[str, Any]) -> Verdict:
    """The verdict on an encoder: by the share of the teacher's score that is left, else by the features' cosine."""
    main = next((m for m in ("accuracy", "spearman") if getattr(student, m) is not None), "cosine")
    words = {"accuracy": "top-1", "spearman": "Spearman correlation", "cosine": "cosine to the teacher's features"}[
        main
    ]
    score = getattr(student, main)
    lines, beaten = [], []
    off = find(rows, "linear_off")
    dead = off is not None and score - getattr(off, main) <= 0
    if off is not None and not dead:
        lines.append(f"The linear branch carries {score - getattr(off, main):.4f} of the {words}.")
    baselines = {
        "zero-token window": "an untrained window",
        "window-only student": "a trained window",
        "none": "no attention at all",
    }
    for name, what in baselines.items():
        lead = _gap(find(rows, name), student, main)
        if lead is None:
            continue
        if lead > 0:
            lines.append(f"{lead:.4f} better than {what}.")
        else:
            beaten.append(what)
            lines.append(f"{-lead:.4f} worse than {what}.")
    if student.retained is not None and student.cosine is not None:
        lines.append(f"Cosine to the teacher's features {student.cosine:.4f}.")
    gates = []
    for key in ("retained", "cosine", "mrr"):
        if (least := gate.get(key)) is not None:
            got = getattr(student, key)
            if key == "mrr":  # passages of one kind are alike: the teacher itself does not find them all
                own = getattr(find(rows, "teacher"), key, None)
                got = got / own if got is not None and own else None
            passed = got is not None and got >= least
            gates.append(Gate(name=key, bound="at least", wanted=least, got=got, passed=passed))
    share = f"{100 * student.retained:.2f} % of the teacher's {words}" if student.retained is not None else None
    if missed := [g for g in gates if not g.passed]:
        level, headline = "failed", "Quality gate missed: " + "; ".join(_words(g) for g in missed)
    elif dead:
        level, headline = "dead", f"The linear branch does nothing: without it the {words} is no lower"
    elif beaten:
        level, headline = "weak", f"No better than {' or '.join(beaten)}"
    else:
        level, headline, share = "good", share or f"{score:.4f} {words}", None
    if share:
        lines.insert(0, f"{share}.")
    return Verdict(level=level, headline=headline, lines=lines, gates=gates)


def _drawings(rows: Sequence[Row], student: Row, gate: Mapping[str, Any]) -> Verdict:
    """The verdict on a diffusion model: by how near it draws to its teacher, from the same noise."""
    swapped, floor = find(rows, "swapped"), find(rows, "teacher, other seeds")
    assert student.distance is not None
    share = student.distance / swapped.distance if swapped is not None and swapped.distance else None
    lines, beaten = [], []
    for row, words in ((find(rows, "zero-token window"), "an untrained circle"), (swapped, "the untrained swap")):
        lead = _gap(student, row, "distance")
        if lead is not None and lead > 0:
            lines.append(f"{lead:.4f} nearer to the teacher's drawings than {words}.")
        elif lead is not None:
            beaten.append(words)
    if floor is not None and floor.distance:
        lines.append(f"The teacher's own drawings from other noise are {floor.distance:.4f} apart.")
    if student.retained is not None:
        lines.append(f"A classifier sees the class asked for {100 * student.retained:.1f} % as often as the teacher's.")
    if student.count_kept is not None and student.placement_kept is not None:
        lines.append(
            f"The number of pictures is kept in {100 * student.count_kept:.1f} % of the mosaics, "
            f"{100 * student.placement_kept:.1f} % of the teacher's pictures are in their places."
        )
    gates = []
    for key, got, bound in (("retained", student.retained, "at least"), ("distance", share, "at most")):
        if (wanted := gate.get(key)) is not None:
            passed = got is not None and (got >= wanted if bound == "at least" else got <= wanted)
            gates.append(Gate(name=key, bound=bound, wanted=wanted, got=got, passed=passed))  # type: ignore[arg-type]
    of_swap = "" if share is None else f", {share:.2f} times the untrained swap's"
    level, headline = "good", f"Distance {student.distance:.4f} to the teacher's drawings{of_swap}"
    if missed := [g for g in gates if not g.passed]:
        lines.insert(0, f"{headline}.")
        level, headline = "failed", "Quality gate missed: " + "; ".join(_words(g) for g in missed)
    elif beaten:
        lines.insert(0, f"{headline}.")
        level, headline = "weak", f"No better than {' or '.join(beaten)}"
    return Verdict(level=level, headline=headline, lines=lines, gates=gates)


def _nothing(student: Row | None, metric: str, gain: float | None, least: float) -> bool:
    """Whether a gain is too small to speak of, or its 95 % interval reaches 0. False where it was not measured."""
    low = student.intervals.get(metric, (None, None))[0] if student is not None else None
    return gain is not None and (gain < least or (low is not None and low <= 0))


def _gates(gate: Mapping[str, Any], ratio: float | None, gain: float | None, dead: bool) -> list[Gate]:
    gates = []
    if (most := gate.get("perplexity_ratio")) is not None:
        passed = ratio is not None and ratio <= most
        gates.append(Gate(name="perplexity_ratio", bound="at most", wanted=most, got=ratio, passed=passed))
    least = gate.get("linear_gain")
    if least is not None and least is not False:
        least = LINEAR_GAIN if least is True else float(least)
        passed = gain is not None and gain >= least and not dead  # dead: it may be chance
        gates.append(Gate(name="linear_gain", bound="at least", wanted=least, got=gain, passed=passed))
    return gates


def _words(gate: Gate) -> str:
    got = "not measured" if gate.got is None else f"is {gate.got:.4g}"
    return f"{gate.name} {got}, wanted {gate.bound} {gate.wanted:g}"


def enforce(verdict: Verdict) -> None:
    """Raises GateError (exit code 4) if a gate was missed. Call it after the report is written."""
    missed = [_words(gate) for gate in verdict.gates if not gate.passed]
    if missed:
        raise GateError(
            f"quality gate missed: {'; '.join(missed)}. Train on more tokens, or relax `gate` in the recipe"
        )


def over_seeds(results: Sequence[Result], gate: Mapping[str, Any] | None = None) -> Result:
    """One result of several runs that differ in their seed: rows averaged and judged anew, all else the first run's.

    A row that only some runs have (a dear baseline, trained once) is their average, and a note says so. Raises
    InputError where a seed occurs twice.
    """
    first, seeds = results[0], [seed for result in results for seed in result.seeds]
    for seed in set(seeds):
        if seeds.count(seed) > 1:
            raise InputError(f"seed {seed} of {first.recipe} occurs twice: average each run once")
    having: dict[str, dict[int, Row]] = {}
    for result in results:
        for row in result.rows:
            having.setdefault(row.name, {})[result.seeds[0]] = row
    rows = [average(list(found.values())) for found in having.values()]
    some = {name: found for name, found in having.items() if len(found) < len(results)}
    notes = [f"{name}: of seed {', '.join(map(str, found))} alone" for name, found in some.items()]
    return first.model_copy(
        update={"seeds": seeds, "rows": rows, "verdict": judge(rows, gate), "notes": [*first.notes, *notes]}
    )
