"""The shipped workflows: as the generator writes them, both forms alike, accepted by ComfyUI."""

import asyncio
import itertools
import json
import re
import shutil
from pathlib import Path

import execution
import folder_paths
import pytest
import torch
from sd3_pack.docs.authoring import thumbnails
from sd3_pack.docs.authoring.files import FOLDER, workflow_files
from sd3_pack.docs.authoring.graph import Graph
from sd3_pack.docs.authoring.node_shapes import extra_nodes, node_shapes
from sd3_pack.docs.authoring.thumbnails import drawing, montage, pictures, runs_here
from sd3_pack.docs.authoring.workflows import WORKFLOWS, describe
from sd3_pack.nodes import NODES, TRAINING_NODES, files
from sd3_pack.nodes.files import EMBEDDED
from ui_to_api import NOTES, to_api

import nodes

NAMES = list(WORKFLOWS)
OURS = {node.GET_SCHEMA().node_id for node in [*NODES, *TRAINING_NODES]}
# Of a checkpoint's own workflow, and those that another program's part holds to full-size models.
NEED_FILES = ("sd3-medium", "sd3.5-medium", "sd3.5-large", "sd3.5-large-turbo", "lora")
NEED_FULL_SIZE = ("controlnet", "native-loader-sd3sample")


@pytest.fixture(scope="module")
def shapes(models):
    return node_shapes()


@pytest.fixture(scope="module")
def written(shapes):
    return workflow_files(shapes)


@pytest.fixture
def registered(monkeypatch):
    """All nodes as a server has them.  Returns titles by id."""
    titles = dict(nodes.NODE_DISPLAY_NAME_MAPPINGS)
    for node in [*extra_nodes(), *NODES, *TRAINING_NODES]:
        schema = node.GET_SCHEMA()
        monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, schema.node_id, node)
        titles[schema.node_id] = schema.display_name or schema.node_id
    return titles


def ui(name):
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def api(name):
    return json.loads((FOLDER / "api" / f"{name}.json").read_text(encoding="utf-8"))


def test_the_files_are_what_the_generator_writes(written):
    """Else: python docs/authoring workflows."""
    there = {path for folder in (FOLDER, FOLDER / "api") for path in folder.glob("*.json")}
    assert there == set(written)
    assert not [path.name for path, text in written.items() if path.read_text("utf-8") != text]


def test_every_workflow_of_the_plan_is_there():
    assert {
        *NEED_FILES,
        *NEED_FULL_SIZE,
        *("first-picture", "image-to-image", "inpainting", "encoder-dropout", "shift"),
        "our-loader-ksampler",
    } <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_front_ends_way_from_one_form_to_the_other_is_the_other_form(name, registered):
    assert to_api(ui(name), nodes.NODE_CLASS_MAPPINGS, registered) == api(name)


# What the front end takes for granted


@pytest.mark.parametrize("name", NAMES)
def test_links_join_the_slots_that_name_them(name):
    workflow = ui(name)
    by_id = {node["id"]: node for node in workflow["nodes"]}
    assert len(by_id) == len(workflow["nodes"])
    assert workflow["last_node_id"] == max(by_id)
    numbers = [link[0] for link in workflow["links"]]
    assert len(set(numbers)) == len(numbers)
    assert workflow["last_link_id"] == max(numbers)
    for number, start, slot, end, place, kind in workflow["links"]:
        output, entry = by_id[start]["outputs"][slot], by_id[end]["inputs"][place]
        assert number in output["links"]
        assert entry["link"] == number
        assert {output["type"], entry["type"]} == {kind}
    ends = [entry["link"] for node in by_id.values() for entry in node["inputs"]]
    starts = [
        n for node in by_id.values() for output in node["outputs"] for n in output["links"] or []
    ]
    assert sorted(filter(None, ends)) == sorted(starts) == sorted(numbers)


@pytest.mark.parametrize("name", NAMES)
def test_widgets_by_name_and_by_position_agree(name):
    for node in ui(name)["nodes"]:
        if node["type"] not in NOTES:
            assert list(node["widgets_values_named"].values()) == node["widgets_values"]
            typed = [entry["name"] for entry in node["inputs"] if "widget" in entry]
            assert set(typed) <= set(node["widgets_values_named"])


@pytest.mark.parametrize("name", NAMES)
def test_every_node_says_which_pack_brings_it(name):
    for node in ui(name)["nodes"]:
        if node["type"] in NOTES:
            continue
        pack = "sd3-workbench" if node["type"] in OURS else "comfy-core"
        assert node["properties"]["cnr_id"] == pack
        assert re.fullmatch(r"\d+\.\d+\.\d+", node["properties"]["ver"])
        assert node["properties"]["Node name for S&R"] == node["type"]


# What people see


@pytest.mark.parametrize("name", NAMES)
def test_no_node_lies_on_another_and_each_in_one_group(name):
    workflow = ui(name)
    boxes = {node["id"]: box(node) for node in workflow["nodes"]}
    for one, other in itertools.combinations(boxes.values(), 2):
        assert not overlap(one, other)
    groups = [group["bounding"] for group in workflow["groups"]]
    for one, other in itertools.combinations(groups, 2):
        assert not overlap(one, other)
    for node in workflow["nodes"]:
        holding = [group for group in groups if inside(boxes[node["id"]], group)]
        assert len(holding) == (node["type"] not in NOTES), node["type"]


def box(node):
    """x, y, width, height with the title, which the front end draws above."""
    (x, y), (width, height) = node["pos"], node["size"]
    return [x, y - 30, width, height + 30]


def overlap(one, other):
    return all(
        one[axis] < other[axis] + other[axis + 2] and other[axis] < one[axis] + one[axis + 2]
        for axis in (0, 1)
    )


def inside(small, large):
    return all(
        large[axis] <= small[axis]
        and small[axis] + small[axis + 2] <= large[axis] + large[axis + 2]
        for axis in (0, 1)
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_note_names_every_file_and_where_it_belongs(name):
    workflow = ui(name)
    (note,) = [node["widgets_values"][0] for node in workflow["nodes"] if node["type"] in NOTES]
    named = {
        value
        for node in workflow["nodes"]
        for value in node["widgets_values"]
        if node["type"] not in NOTES and str(value).endswith(".safetensors")
    }
    missing = [file for file in named if not re.search(rf"`models/\w+/{re.escape(file)}`", note)]
    assert not missing
    for node in workflow["nodes"]:
        for model in node["properties"].get("models", []):
            assert model["url"].startswith("https://huggingface.co/")
            assert model["url"].endswith(f"/{model['name']}")
            assert f"models/{model['directory']}/{model['name']}" in note


@pytest.mark.parametrize("name", NAMES)
def test_a_thumbnail_lies_beside_it(name):
    """The template browser shows NAME.jpg; else: python docs/authoring thumbnails --only NAME."""
    content = (FOLDER / f"{name}.jpg").read_bytes()
    assert content.startswith(b"\xff\xd8\xff")
    assert len(content) < 100_000


@pytest.mark.parametrize(("name", "count"), [("image-to-image", 2), ("shift", 3)])
def test_the_built_in_models_thumbnail_is_what_it_draws(
    name, count, shapes, registered, stocked, models, monkeypatch
):
    for kind in ("output_directory", "temp_directory"):  # the thumbnails' own do not stay
        monkeypatch.setattr(folder_paths, kind, str(models / "output"))
    graph = describe(name, shapes)
    assert runs_here(graph)
    shown = pictures(graph)
    assert [image.size for image in shown] == [(64, 64)] * count
    assert all(len(image.getcolors(64 * 64)) > 1 for image in shown)
    assert montage(shown).size == (512, 512)


def test_a_workflow_that_names_files_shows_its_graph(shapes, stocked):
    graph = describe("sd3.5-medium", shapes)
    assert not runs_here(graph)
    image = drawing(graph)
    assert image.size == (512, 512)
    assert len(image.getcolors(512 * 512)) > 20


# What ComfyUI's server says


@pytest.fixture
def stocked(models, monkeypatch, tmp_path):
    """A file for each name in the workflows, and the built-in model: all one tiny model."""
    tiny = models / "checkpoints" / "tiny.safetensors"
    for module in (files, thumbnails):
        monkeypatch.setattr(module, "embedded_file", lambda: tiny)
    folders = {}
    for workflow in map(ui, NAMES):
        note = next(n["widgets_values"][0] for n in workflow["nodes"] if n["type"] in NOTES)
        for folder, file in re.findall(r"`models/(\w+)/([^`]+)`", note):
            folders.setdefault(folder, set()).add(file)
    for folder, names in folders.items():
        (tmp_path / folder).mkdir()
        for file in names:
            shutil.copy(tiny, tmp_path / folder / file)
        kinds = folder_paths.folder_names_and_paths[folder][1]
        entry = ([str(tmp_path / folder)], kinds)
        monkeypatch.setitem(folder_paths.folder_names_and_paths, folder, entry)
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / "example.png").touch()
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path / "input"))
    folder_paths.filename_list_cache.clear()
    yield
    folder_paths.filename_list_cache.clear()


def refused(prompt):
    """What the server would answer with 400; None when it would run the prompt."""
    with torch.inference_mode(False):
        valid, error, outputs, faults = asyncio.run(execution.validate_prompt("p", prompt, None))
    return None if valid and not faults and outputs else (error, faults)


@pytest.mark.parametrize("name", NAMES)
def test_the_server_accepts_it(name, registered, stocked):
    assert refused(api(name)) is None


def test_the_server_would_notice_a_wrong_one(registered, stocked):
    prompt = api("first-picture")
    prompt["2"]["inputs"]["clip"] = ["1", 0]
    assert refused(prompt)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in NEED_FULL_SIZE])
def test_changing_the_loaders_file_is_enough_for_the_built_in_model(name, registered, stocked):
    """Sizes come from the model, never from a number in a workflow."""
    prompt = api(name)
    loaders = [node for node in prompt.values() if node["class_type"] == "SD3LoadCheckpoint"]
    assert [node["inputs"]["ckpt_name"] == EMBEDDED for node in loaders] == [name not in NEED_FILES]
    for node in loaders:
        node["inputs"]["ckpt_name"] = EMBEDDED
    assert refused(prompt) is None
    for node in prompt.values():
        if node["class_type"] == "SD3EmptyLatent":
            assert node["inputs"]["aspect"] == "1:1"
            assert node["inputs"]["model"] == ["1", 0]
        assert node["class_type"] not in ("EmptySD3LatentImage", "ImageScale")


def test_the_readme_names_those_that_need_files():
    readme = (FOLDER.parent / "README.md").read_text(encoding="utf-8")
    said = re.search(r"Every workflow\s+runs with it but (.+?)\.\s", readme, re.DOTALL)
    assert said
    assert set(re.findall(r"\*(\S+?)\*", said[1])) == {*NEED_FILES, *NEED_FULL_SIZE}


# The generator itself


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"ckpt": "x"}, "has no input ckpt"),
        ({}, "ckpt_name needs a value"),
    ],
)
def test_a_description_that_does_not_fit_the_schema_is_refused(values, words, shapes):
    graph = Graph("wrong", shapes, "")
    graph.group("One")
    with pytest.raises(ValueError, match=words):
        graph.node("SD3LoadCheckpoint", **values)


def test_an_output_of_another_type_is_refused(shapes):
    graph = Graph("wrong", shapes, "")
    graph.group("One")
    load = graph.node("SD3LoadCheckpoint", ckpt_name=EMBEDDED)
    with pytest.raises(ValueError, match="takes CLIP, not MODEL"):
        graph.node("SD3EncodePrompt", clip=load["MODEL"], prompt="", negative="")
    with pytest.raises(ValueError, match="has the outputs MODEL, CLIP, VAE, not IMAGE"):
        load["IMAGE"]


def test_only_workflows_lie_where_the_template_browser_looks():
    """Any JSON there would be offered as a template."""
    listed = {path.stem for path in FOLDER.glob("*.json")}
    assert listed == set(NAMES)
    assert {path.stem for path in Path(FOLDER / "api").iterdir()} == listed


@pytest.mark.parametrize("name", ["pick", "blind-comparison"])
def test_picks_are_stored_with_what_was_drawn(name):
    """One node each says prompt and seed to all: two could be changed apart, and DPO would learn
    from another prompt than was drawn."""
    form = api(name)
    (pick,) = (node["inputs"] for node in form.values() if node["class_type"] == "SD3Pick")
    assert form[pick["prompt"][0]]["class_type"] == "PrimitiveStringMultiline"
    assert form[pick["seed"][0]]["class_type"] == "PrimitiveInt"
    for kind, entry in (("SD3EncodePrompt", "prompt"), ("SD3Sample", "seed")):
        given = [node["inputs"][entry] for node in form.values() if node["class_type"] == kind]
        assert given
        assert all(link == pick[entry] for link in given)
