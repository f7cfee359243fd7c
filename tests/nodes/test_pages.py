"""Help pages and English texts: as the generator writes them, complete, and in ComfyUI's form."""

import json
import re

import pytest
from sd3_pack.docs.authoring.pages import DOCS, LOCALES, page_files, read_codes, read_help, schemas
from sd3_pack.nodes.errors import CODES
from sd3_pack.sd3_core.presets import PRESETS

SCHEMAS = {schema.node_id: schema for schema in schemas()}


@pytest.fixture(autouse=True)
def lists(models):
    """The widgets' lists are those of the test's own folders."""


def test_the_files_are_what_the_generator_writes():
    """Else: python docs/authoring pages."""
    files = page_files()
    there = {*DOCS.glob("*.md"), *LOCALES.glob("*.json")}
    assert there == set(files)
    assert not [path.name for path, text in files.items() if path.read_text("utf-8") != text]


def test_a_users_files_are_on_no_page(models):
    names = [path.name for path in (models / "checkpoints").glob("*.safetensors")]
    assert "tiny.safetensors" in names
    text = "".join(page_files().values())
    assert not [name for name in names if name in text]


def test_help_was_written_for_every_node_and_for_no_other():
    assert set(read_help()) == set(SCHEMAS)


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_page_names_every_input_and_output_with_its_tooltip(name):
    page = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {SCHEMAS[name].display_name}\n")
    for entry in SCHEMAS[name].inputs:
        assert re.search(rf"^\| `{entry.id}` \|.*{re.escape(entry.tooltip)}", page, re.MULTILINE)
    for entry in SCHEMAS[name].outputs:
        assert entry.tooltip in page


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_picture_on_a_page_exists_and_is_small(name):
    """The front end makes the address from the page's own."""
    page = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    for place in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page):
        assert (DOCS / place).stat().st_size < 100_000


def test_every_code_is_explained_and_told_on_a_page():
    assert set(read_codes()) == set(CODES)
    told = {code for written in read_help().values() for code in written.errors}
    assert told == set(CODES)


def test_presets_stand_in_the_pages_as_they_are():
    sample, schedule = (read_help()[name].text for name in ("SD3Sample", "SD3ShiftSchedule"))
    turbo = PRESETS["sd3.5_large_turbo"]
    assert f"| {turbo.title} | {turbo.cfg} | {turbo.sampler} |" in sample
    assert f"| {turbo.title} | {turbo.steps} | {turbo.shift} |" in schedule


def test_the_english_texts_are_those_of_the_schemas():
    texts = json.loads((LOCALES / "nodeDefs.json").read_text(encoding="utf-8"))
    assert list(texts) == list(SCHEMAS)
    for name, schema in SCHEMAS.items():
        assert texts[name]["display_name"] == schema.display_name
        assert list(texts[name]["inputs"]) == [entry.id for entry in schema.inputs]
        assert len(texts[name]["outputs"]) == len(schema.outputs)
