"""The site of the documentation builds without a warning: `make docs` does the same."""

import os
import re
import subprocess
import sys
from html import unescape
from pathlib import Path

import griffe
import pytest

import steer_client
from steer_client.channel import ClientOptions
from steer_service.core.capture import CaptureEntry
from steer_service.runtime.call_options import ChatKeywords, GenerateKeywords, ScoreKeywords, StreamEventsKeywords

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built site."""
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    return folder


def test_the_site_has_a_page_for_every_page_of_docs(site: Path) -> None:
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert pages - {path.stem for path in site.glob("*.html")} == set()


def test_the_site_loads_nothing_from_another_host(site: Path) -> None:
    for page in site.rglob("*.html"):
        loaded = re.findall(r"<(?:script|img|link|iframe)[^>]*?\b(?:src|href)=\"(https?://[^\"]*)\"", page.read_text())
        assert loaded == [], page


def test_every_export_of_the_client_is_in_the_reference_with_its_docstring(site: Path) -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in (site / "api").glob("*.html"))
    missing = [name for name in steer_client.__all__ if f'id="steer_client.{name}"' not in text]
    assert missing == []
    first_sentence = (steer_client.SteeringSpec.__doc__ or "").split("\n")[0].replace("`", "")
    assert first_sentence in plain(site / "api" / "steering.html")


def plain(page: Path) -> str:
    """The text of a page of the site."""
    return unescape(re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    ("call", "keywords"),
    [
        ("AsyncSteerClient", ClientOptions),
        ("generate", GenerateKeywords),
        ("chat", ChatKeywords),
        ("score", ScoreKeywords),
        ("stream_events", StreamEventsKeywords),
    ],
)
def test_the_signature_of_a_call_has_each_of_its_keywords(site: Path, call: str, keywords: type) -> None:
    signatures = re.findall(rf"^ *{call}\(\n(.*?)^ *\)", plain(site / "api" / "clients.html"), re.DOTALL | re.MULTILINE)
    assert signatures
    for signature in signatures:
        assert set(keywords.__annotations__) - set(re.findall(r"^ +(\w+): ", signature, re.MULTILINE)) == set()


def test_the_reference_has_the_fields_of_a_capture_entry(site: Path) -> None:
    text = (site / "api" / "results.html").read_text(encoding="utf-8")
    assert [name for name in CaptureEntry.__annotations__ if f'id="steer_client.CaptureEntry.{name}"' not in text] == []


def test_the_reference_names_nothing_by_its_place_in_the_source(site: Path) -> None:
    modules = {path.stem for top in ("steer_client", "steer_service") for path in (ROOT / top).rglob("*")} - {
        "steering"
    }
    for page in (site / "api").glob("*.html"):
        places = re.findall(r"<code>([a-z_]+)\.[\w.]+</code>", page.read_text(encoding="utf-8"))
        assert modules & set(places) <= {"model"}, page  # `model.layers.13` of other projects


def test_every_field_and_method_of_an_export_has_a_docstring() -> None:
    loader = griffe.GriffeLoader(search_paths=[ROOT])
    client = loader.load("steer_client")
    loader.load("steer_service")
    loader.resolve_aliases(external=False)
    missing = []
    for name in steer_client.__all__:
        exported = client[name].final_target if client[name].is_alias else client[name]
        members = exported.members.items() if exported.is_class else ()
        public = {f"{name}.{member}": what for member, what in members if not (member.startswith("_") or what.is_alias)}
        missing += [where for where, what in ({name: exported} | public).items() if not what.docstring]
    known = {where for where in missing if where.endswith(".default_reason")}  # not shown
    known |= {where for where in missing if where.startswith("SamplingKeywords.")}  # those of SamplingOptions
    assert set(missing) - known == set()


@pytest.mark.parametrize(
    "page",
    ["repository/deploy/README.html", "repository/proto/steer/v1/errors.proto.html", "repository/examples/index.html"],
)
def test_files_outside_of_docs_that_pages_link_to_are_in_the_site(site: Path, page: str) -> None:
    assert (site / page).exists() or (site / page.replace("README", "index")).exists()


def test_a_link_that_leads_nowhere_fails_the_build(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# Page\n\n[gone](../deploy/gone.yaml)\n")
    (tmp_path / ".ci").mkdir()
    (tmp_path / ".ci" / "site_repository.py").write_bytes((ROOT / ".ci" / "site_repository.py").read_bytes())
    (tmp_path / "mkdocs.yml").write_text("site_name: x\nhooks: [.ci/site_repository.py]\n")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    built = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert built.returncode == 1
    assert "../deploy/gone.yaml, which does not exist" in built.stderr
