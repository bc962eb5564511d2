"""The dashboard and the alerts name series, labels and values that the server has; vLLM's are in real_server/."""

import re

import pytest

from tests.deploy.queries import (
    OF_TARGET,
    Need,
    alerts,
    dashboard,
    dashboard_queries,
    grouped_labels,
    labels_on,
    needs_of,
    own_part,
    panels,
)

QUERIES = [*dashboard_queries(), *(rule["expr"] for rule in alerts())]


def test_every_series_of_the_dashboard_and_the_alerts_exists_before_the_first_request(page: str) -> None:
    there = labels_on(page)
    needs = [need for need in needs_of(QUERIES) if not need.name.startswith("vllm:")]
    assert len(needs) > 40
    assert [need for need in needs if not need.is_met(there)] == []


@pytest.mark.parametrize(
    "need",
    [
        Need("", "steerllm_no_such_series", {}),
        Need("", "steerllm_requests", {"state": "sleeping"}),
        Need("", "steerllm_requests", {"phase": "running"}),
        Need("", "steerllm_requests_finished_total", {"code": "OK|NEVER"}),
    ],
)
def test_a_series_a_label_or_a_value_that_is_not_there_is_noticed(page: str, need: Need) -> None:
    assert not need.is_met(labels_on(page))


def test_queries_group_and_show_by_labels_that_their_series_have(page: str) -> None:
    there = labels_on(page)
    for panel in panels():
        for target in panel["targets"]:
            needs = [need for need in needs_of([target["expr"]]) if not need.name.startswith("vllm:")]
            used = grouped_labels(target["expr"]) | set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            for need in needs:
                assert used - OF_TARGET <= set(there[need.name]), target


def test_every_own_series_is_on_the_dashboard(page: str) -> None:
    shown = {re.sub("_(bucket|count|sum)$", "", need.name) for need in needs_of(dashboard_queries())}
    own = {re.sub("_(bucket|count|sum)$", "", name) for name in labels_on(own_part(page))}
    texts = {"steerllm_start_proof_info"}
    assert {name for name in own if not name.endswith("_created")} - texts - shown == set()


def test_the_dashboard_can_be_imported_into_any_grafana() -> None:
    found = dashboard()
    assert "__inputs" not in found
    assert [one["name"] for one in found["templating"]["list"]] == ["datasource", "job", "instance"]
    for panel in panels():
        assert panel["datasource"]["uid"] == "${datasource}"
        for target in panel["targets"]:
            assert 'job=~"$job",instance=~"$instance"' in target["expr"]
    ids = [panel["id"] for panel in found["panels"]]
    assert len(ids) == len(set(ids))


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard()["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells


def test_every_alert_says_how_bad_it_is_and_what_is_wrong() -> None:
    names = [rule["alert"] for rule in alerts()]
    assert len(names) == len(set(names))
    for rule in alerts():
        assert rule["alert"].startswith("Steerllm")
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"]["summary"]
