"""The report, in Markdown: a line for each part, then what each of them found."""

from collections.abc import Iterator, Mapping

from bench.on_gpu.part_results import Outcome, PartResult


def report(head: str, titles: Mapping[int, str], results: Mapping[int, PartResult]) -> str:
    """The whole report.

    `head`: date, device and versions, in a sentence. `titles`: number -> name of each part; one that has no result was
    not run.
    """
    known = {number: results.get(number, PartResult(outcome=Outcome.NOT_RUN)) for number in titles}
    lines = ["# steerllm on a GPU", "", head, "", "| part | outcome | seconds | limit, s | targets met |"]
    lines.append("|---|---|---|---|---|")
    lines += [f"| {number}. {titles[number]} | {_columns(result)} |" for number, result in known.items()]
    for number, result in known.items():
        if result.outcome is not Outcome.NOT_RUN:
            lines += ["", f"## {number}. {titles[number]}", "", *_section(number, result)]
    return "\n".join(lines) + "\n"


def _columns(result: PartResult) -> str:
    if result.outcome in (Outcome.NOT_RUN, Outcome.NOT_ENDED):
        reason = f": {result.reason}" if result.reason else ""
        return f"{result.outcome}{reason} | | | "
    targets = result.reading.targets
    met = f"{sum(target.is_met for target in targets)} of {len(targets)}" if targets else "not known"
    return f"{result.outcome} | {result.seconds:.0f} | {result.limit_s:.0f} | {met}"


def _section(number: int, result: PartResult) -> Iterator[str]:
    yield f"{result.outcome.capitalize()}. Begun {result.began}; {result.machine}."
    yield f"Log: `{log_name(number)}`. Command: `{result.command}`"
    if result.reason:
        yield from ("", f"What is wrong: {result.reason}.")
    if result.reading.targets:
        yield from ("", "| target | figure | wanted | met |", "|---|---|---|---|")
        for target in result.reading.targets:
            yield f"| {target.what} | {target.figure} | {target.target} | {'yes' if target.is_met else 'NO'} |"
    if result.reading.lines:
        yield from ("", *result.reading.lines)
    if result.last_lines:
        yield from ("", "The end of the log:", "", "```text", *result.last_lines, "```")


def log_name(number: int) -> str:
    """Name of the log of a part."""
    return f"part_{number}.log"
