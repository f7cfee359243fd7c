"""Training as it is watched: the node while it learns, and the graph that a saved LoRA holds."""

import base64
import json
import re

import pytest
from api_workflows import EMBEDDED, node
from comfy_page import Editor
from training_set import write_pictures

LOADER, PICTURES, TRAIN, SAVE = range(1, 5)
PLACES = {LOADER: [0, 0], PICTURES: [400, 0], TRAIN: [800, 0], SAVE: [1300, 0]}
STEPS = 40
# What the node shows while it runs: the text under its widgets, and the picture's [width, height].
LIVE = """async (id) => {
    const node = app.graph.getNodeById(id);
    const text = node.widgets.find((w) => w.name === "$$node-text-preview")?.value ?? "";
    const url = app.nodePreviewImages[id]?.[0];
    if (!text || !url) return null;
    const image = new Image();
    image.src = url;
    try { await image.decode(); } catch { return null; }  // the next one has taken its place
    const shown = document.querySelector(`[data-node-id="${id}"] img[src^="blob:"]`);
    return { text, size: [image.naturalWidth, image.naturalHeight],
        drawn: LiteGraph.vueNodesMode ? !!shown : node.imgs?.[0]?.src === url };
}"""
DROP = """([name, content]) => {
    const bytes = Uint8Array.from(atob(content), (c) => c.charCodeAt(0));
    const dataTransfer = new DataTransfer();
    dataTransfer.items.add(new File([bytes], name));
    const place = { clientX: 200, clientY: 800, bubbles: true, cancelable: true };
    app.canvas.canvas.dispatchEvent(new DragEvent("drop", { dataTransfer, ...place }));
}"""


def training(run_name: str, steps: int):
    """A LoRA of the built-in model, in API form."""
    return {
        str(LOADER): node("SD3LoadCheckpoint", ckpt_name=EMBEDDED),
        str(PICTURES): node(
            "SD3TrainingImages", clip=["1", 1], vae=["1", 2], folder="shapes", repeats=1
        ),
        str(TRAIN): node(
            "SD3TrainLoRA",
            model=["1", 0],
            dataset=["2", 0],
            run_name=run_name,
            steps=steps,
            learning_rate=0.001,
            rank=2,
            batch_size=1,
            resolution=64,
            seed=0,
            warmup=0,
            sample_prompt="a red circle",
            sample_every=0,
            validate_every=0,
            more="sample_steps = 2",
        ),
        str(SAVE): node(
            "SD3SaveLoRA",
            lora=["3", 1],
            filename_prefix=f"loras/{run_name}",
            dialect="comfy",
            save_dtype="fp16",
        ),
    }


@pytest.fixture
def opened(editor: Editor, server, request):
    """opened(steps) -> the name of a run, whose graph is open in the editor."""
    write_pictures(server.folder / "input" / "shapes", 4)

    def open_training(steps: int) -> str:
        run_name = "".join(c if c.isalnum() else "-" for c in request.node.name)
        editor.open(training(run_name, steps))
        editor.page.evaluate(
            "places => app.graph.nodes.forEach((n) => { n.pos = places[n.id]; })", PLACES
        )
        editor.fit()
        return run_name

    return open_training


def test_loss_and_samples_are_seen_while_it_learns(editor, opened, screenshot):
    opened(STEPS)
    editor.page.evaluate("() => { app.queuePrompt(0, 1); }")

    def learning():
        live = editor.page.evaluate(LIVE, TRAIN)
        return live if live and "loss" in live["text"] and live["drawn"] else None

    live = editor.until(learning)
    screenshot("-live")
    assert re.match(rf"step \d+ of {STEPS}, loss \d+\.\d+", live["text"])
    width, height = live["size"]
    assert height > 0.7 * width  # the curve, and under it the picture from before the first step
    editor.until(lambda: editor.report_of(TRAIN))
    pictures = "id => app.graph.getNodeById(id).imgs?.length"
    editor.until(lambda: editor.page.evaluate(pictures, TRAIN))
    screenshot("-done")


def test_a_saved_lora_dropped_on_the_canvas_brings_its_graph_back(editor, opened, server):
    run_name = opened(1)
    before = editor.to_api()
    editor.run()
    (file,) = (server.folder / "output" / "loras").glob(f"{run_name}*.safetensors")
    editor.open({"9": node("SD3TimestepDensity")})
    content = base64.b64encode(file.read_bytes()).decode()
    editor.page.evaluate(DROP, [file.name, content])
    editor.until(lambda: editor.to_api() == before)
    assert json.dumps(run_name) in json.dumps(editor.to_ui())
