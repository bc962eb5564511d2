"""What the tests of `steer doctor` compare."""

from collections.abc import Iterable

from steer_service.cli.doctor.findings import Finding


def only(findings: Iterable[Finding]) -> tuple[str, str]:
    """Status and text of the only finding."""
    [finding] = findings
    return str(finding.status), finding.text


def by_check(findings: Iterable[Finding]) -> dict[str, tuple[str, str]]:
    """Check -> status and text."""
    return {finding.check: (str(finding.status), finding.text) for finding in findings}
