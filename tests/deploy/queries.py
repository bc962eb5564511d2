"""The queries of the dashboard and the alerts, and the series and labels that they need."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import promql_parser
import yaml
from prometheus_client.parser import text_string_to_metric_families

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARD = DEPLOY / "grafana" / "steerllm.json"
ALERTS = DEPLOY / "prometheus" / "alerts.yaml"

OF_PROMETHEUS = {"up"}
"""Series that Prometheus itself makes for each target."""
OF_TARGET = {"job", "instance"}
"""Labels that Prometheus itself adds."""

Labels = Mapping[str, set[str]]
"""Label -> its values."""


@dataclass(frozen=True)
class Need:
    """A series that a query reads."""

    query: str
    name: str
    wanted: Mapping[str, str]
    """Label -> its value, or several of them as `A|B`."""

    def is_met(self, page: Mapping[str, Labels]) -> bool:
        """True if the page has the series, with the labels and all values that are asked for."""
        labels = page.get(self.name)
        return labels is not None and all(
            set(values.split("|")) <= labels.get(label, set()) for label, values in self.wanted.items()
        )


def dashboard() -> dict[str, Any]:
    return json.loads(DASHBOARD.read_text(encoding="utf-8"))


def panels() -> list[dict[str, Any]]:
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def dashboard_queries() -> list[str]:
    return [target["expr"] for panel in panels() for target in panel["targets"]]


def alerts() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"] for rule in group["rules"]]


def parsed(query: str) -> promql_parser.Expr:
    """Raises ValueError for a query that is not PromQL, with Grafana's variables."""
    return promql_parser.parse(query.replace("$__rate_interval", "5m"))


def needs_of(queries: Iterable[str]) -> list[Need]:
    return [need for query in queries for need in _needs(query)]


def grouped_labels(query: str) -> set[str]:
    """The labels that the aggregations of a query keep."""
    found: set[str] = set()

    def visit(node: promql_parser.Expr) -> None:
        if isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
            found.update(node.modifier.labels)

    promql_parser.walk(parsed(query), visit)
    return found


def labels_on(page: str) -> Mapping[str, Labels]:
    """Name of each sample of a page -> its labels."""
    found: dict[str, dict[str, set[str]]] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            of_name = found.setdefault(sample.name, {})
            for label, value in sample.labels.items():
                of_name.setdefault(label, set()).add(value)
    return found


def own_part(page: str) -> str:
    """The families of a page whose names are this project's."""
    blocks = re.split(r"^(?=# HELP )", page, flags=re.MULTILINE)
    return "".join(block for block in blocks if block.startswith("# HELP steerllm_"))


def _needs(query: str) -> Iterator[Need]:
    selectors: list[promql_parser.VectorSelector] = []

    def visit(node: promql_parser.Expr) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            selectors.append(node)

    promql_parser.walk(parsed(query), visit)
    for one in selectors:
        wanted = {each.name: each.value for each in one.matchers.matchers if each.name not in OF_TARGET}
        if one.name not in OF_PROMETHEUS:
            yield Need(query, str(one.name), wanted)
