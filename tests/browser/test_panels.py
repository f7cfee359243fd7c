"""What a user sees on our nodes, in both of ComfyUI's renderers."""

import json
import re

import pytest
from comfy_page import Editor

LOADER, PROMPT, EMPTY, SCHEDULE, SAMPLE, DECODE, PREVIEW = range(1, 8)
PLACES = {
    LOADER: [0, 0],
    PROMPT: [400, 0],
    EMPTY: [400, 540],
    SCHEDULE: [860, 0],
    SAMPLE: [860, 420],
    DECODE: [1260, 0],
    PREVIEW: [1260, 240],
}
CURVES = (
    "() => [...document.querySelectorAll('.sd3-schedule path')].map((p) => p.getAttribute('d'))"
)

SAVED_WIDGETS = """(id) => (app.graph.getNodeById(id).widgets ?? [])
    .filter((widget) => widget.serialize !== false).map((widget) => widget.name)"""
# Panels that stick out of their nodes by more than two pixels of the screen.
OUTSIDE = """() => app.graph.nodes.flatMap((node) => {
    const panel = node.widgets?.find((widget) => widget.name === "sd3_report")?.element;
    if (!panel?.isConnected || !panel.getClientRects().length) return [];
    const { scale, offset } = app.canvas.ds;
    const canvas = app.canvas.canvas.getBoundingClientRect();
    const left = canvas.left + (node.pos[0] + offset[0]) * scale - 2;
    const top = canvas.top + (node.pos[1] + offset[1]) * scale - 2;
    const right = left + node.size[0] * scale + 4;
    const bottom = top + node.size[1] * scale + 4;
    const seen = panel.getBoundingClientRect();
    const inside = seen.left >= left && seen.right <= right
        && seen.top >= top && seen.bottom <= bottom;
    return inside ? [] : [`${node.type}: ${JSON.stringify(seen)}, not in ${left} ${top} ${right} `
        + `${bottom}`];
})"""


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs, "_meta": {"title": kind}}


def workflow(seed: int = 7, steps: int = 3, shift: float = 1.0):
    """A first picture, in API form."""
    return {
        str(LOADER): node(
            "SD3LoadCheckpoint", ckpt_name="SD3 Tiny (built-in: draws coloured shapes)"
        ),
        str(PROMPT): node(
            "SD3EncodePrompt", clip=["1", 1], prompt="a red circle", negative="", use_t5=False
        ),
        str(EMPTY): node("SD3EmptyLatent", aspect="1:1", batch_size=1, model=["1", 0]),
        str(SCHEDULE): node(
            "SD3ShiftSchedule",
            steps=steps,
            shift=shift,
            scheduler="normal",
            denoise=1.0,
            auto_shift=False,  # ComfyUI leaves unnamed widgets as they were in the last API form
        ),
        str(SAMPLE): node(
            "SD3Sample",
            model=["1", 0],
            positive=["2", 0],
            negative=["2", 1],
            latent_image=["3", 0],
            sigmas=["4", 0],
            seed=seed,
            cfg=4.5,
            sampler_name="euler",
        ),
        str(DECODE): node("SD3VAEDecode", samples=["5", 0], vae=["1", 2]),
        str(PREVIEW): node("PreviewImage", images=["6", 0]),
    }


def opened(editor: Editor, **settings) -> None:
    editor.open(workflow(**settings))
    editor.page.evaluate(
        "places => app.graph.nodes.forEach((n) => { n.pos = places[n.id]; })", PLACES
    )
    editor.set_widget(SAMPLE, "control_after_generate", "fixed")
    editor.fit()


def curves(editor: Editor) -> list[str]:
    return editor.page.evaluate(CURVES)


def curves_other_than(editor: Editor, before: list[str]) -> list[str]:
    """Once they have changed."""
    return editor.until(lambda: now if (now := curves(editor)) != before else None)


def report(editor: Editor, number: int) -> str:
    """Once there is one."""
    return editor.until(lambda: editor.report_of(number))


def test_a_run_fills_every_panel_and_shows_the_picture(editor, screenshot):
    opened(editor)
    screenshot("-before")
    editor.run()
    screenshot()
    assert "MMDiT, VAE, CLIP-L, CLIP-G, T5" in report(editor, LOADER)
    prompt = report(editor, PROMPT)
    assert "tokens" in prompt
    assert "T5 (off)" in prompt
    size = report(editor, EMPTY)  # the built-in model's own
    assert re.fullmatch(r"size\n(\d+) × \1", size)
    sample = report(editor, SAMPLE)
    assert "euler, 3 steps, shift 1" in sample
    assert "took" in sample
    assert "speed\nmodulation table" in sample
    assert "not asked for" not in sample  # the hint says what did not act, and why
    assert report(editor, DECODE).startswith(size)
    pictures = "id => app.graph.getNodeById(id).imgs?.length"
    editor.until(lambda: editor.page.evaluate(pictures, PREVIEW) == 1)


@pytest.mark.long
def test_a_second_run_out_of_the_cache_still_reports(editor):
    opened(editor, seed=8)
    editor.run()
    opened(editor, seed=8)  # the same nodes anew: their panels are empty again
    assert editor.report_of(SAMPLE) is None
    editor.run()
    assert "euler, 3 steps" in report(editor, SAMPLE)


def test_the_curve_is_what_python_says_and_follows_the_widgets(editor, server, screenshot):
    opened(editor, steps=12, shift=3.0)
    first = curves_other_than(editor, [])
    screenshot("-3")
    editor.set_widget(SCHEDULE, "shift", 9.0)
    second = curves_other_than(editor, first)
    screenshot("-9")
    query = "steps=12&shift=9&scheduler=normal&denoise=1"
    told = server.request(f"/sd3_workbench/schedule?{query}")
    _, sigma, dots = second
    heights = [float(point.split()[1]) for point in sigma[1:].split("L")]
    assert heights == pytest.approx([96 - 92 * level for level in told["sigmas"]], abs=0.006)
    assert dots.count("M") == 13


@pytest.mark.long
def test_values_no_node_takes_leave_the_curve_alone(editor):
    opened(editor, steps=6)
    before = curves_other_than(editor, [])
    editor.errors.clear()
    editor.set_widget(SCHEDULE, "steps", 0)
    editor.page.wait_for_timeout(600)
    assert curves(editor) == before
    assert "6 steps" in editor.page.inner_text(".sd3-schedule")
    assert all("400 (Bad Request)" in error for error in editor.errors)
    editor.errors.clear()


@pytest.mark.long
def test_auto_shift_waits_for_the_run_that_knows_the_size(editor):
    opened(editor, steps=4)
    curves_other_than(editor, [])
    editor.page.evaluate(
        "([s, e]) => { const g = app.graph; const from = g.getNodeById(e), to = g.getNodeById(s);"
        " from.connect(0, to, to.inputs.findIndex((i) => i.name === 'latent')); }",
        [SCHEDULE, EMPTY],
    )
    editor.set_widget(SCHEDULE, "auto_shift", True)
    assert curves(editor) == []
    assert "After a run" in editor.page.inner_text(".sd3-schedule")
    editor.run()
    assert len(curves_other_than(editor, [])) == 3
    assert "4 steps, shift 1" in editor.page.inner_text(".sd3-schedule")


@pytest.mark.long
def test_pointing_at_the_curve_reads_a_step(editor):
    opened(editor, steps=4, shift=1.0)
    curves_other_than(editor, [])
    box = editor.page.locator(".sd3-schedule svg").bounding_box()
    editor.page.mouse.move(box["x"] + 2, box["y"] + box["height"] / 2)
    editor.page.mouse.move(box["x"] + 4, box["y"] + box["height"] / 2)
    text = editor.page.inner_text(".sd3-schedule")
    assert "step 1" in text
    assert "sigma 1.0000" in text
    assert "log-SNR −∞" in text
    editor.page.mouse.move(5, 500)
    assert "4 steps, shift 1" in editor.page.inner_text(".sd3-schedule")


def test_names_of_files_are_text_and_never_html(editor):
    opened(editor)
    evil = "<img src=x onerror=window.struck=1>"
    told = {
        "files": {"mmdit": {"file": evil, "fingerprint": evil}},
        "notes": [evil],
        evil: evil,
        "constructor": 1,
    }
    editor.page.evaluate(
        "([id, r]) => app.graph.getNodeById(id).onExecuted({ sd3_report: [r] })", [LOADER, told]
    )
    editor.page.wait_for_timeout(300)
    assert editor.report_of(LOADER).count(evil) == 4  # of the key as of the value
    assert editor.page.locator(".sd3-report img").count() == 0
    assert editor.page.evaluate("() => window.struck") is None


@pytest.mark.long
def test_keys_that_no_writer_knows_are_shown_as_they_are(editor):
    opened(editor)
    told = {
        "seed": 545536269347402,
        "loss": 0.123456789,
        "stopped": False,
        "losses": list(range(9)),
        "lora": {"file": "shapes.safetensors", "fingerprint": "abc"},
        "of_both": {"left": 1, "right": None},
    }
    editor.page.evaluate(
        "([id, r]) => app.graph.getNodeById(id).onExecuted({ sd3_report: [r] })", [DECODE, told]
    )
    lines = report(editor, DECODE).split("\n")
    assert dict(zip(lines[::2], lines[1::2], strict=True)) == {
        "seed": "545536269347402",
        "loss": "0.123457",
        "stopped": "no",
        "losses": "9 values",
        "LoRA": "shapes.safetensors",
        "of both": "left 1, right –",
    }


def test_a_report_is_no_part_of_the_saved_workflow(editor):
    opened(editor)
    editor.run()
    saved = {entry["id"]: entry for entry in editor.to_ui()["nodes"]}
    assert "generated" not in json.dumps(saved)
    for number, entry in saved.items():
        widgets = editor.page.evaluate(SAVED_WIDGETS, number)
        assert "sd3_report" not in widgets
        assert len(entry.get("widgets_values") or []) == len(widgets), entry["type"]
    assert not any("sd3_report" in entry["inputs"] for entry in editor.to_api().values())


def test_panels_lie_inside_their_nodes_at_any_zoom_and_in_either_theme(editor, screenshot):
    opened(editor)
    editor.run()
    for theme, zoom in (("light", 0.9), ("light", 0.45), ("dark", 1.6), ("dark", 0.9)):
        editor.set("Comfy.ColorPalette", theme)
        editor.page.evaluate(
            "z => { app.canvas.ds.scale = z; app.canvas.ds.offset = [150, 120];"
            " app.canvas.setDirty(true, true); }",
            zoom,
        )
        editor.page.wait_for_timeout(500)
        screenshot(f"-{theme}-{zoom:g}")
        outside = editor.page.evaluate(OUTSIDE)
        assert outside == []


@pytest.mark.long
def test_wheel_and_middle_button_move_the_canvas_from_a_panel_too(editor):
    opened(editor, steps=4)
    curves_other_than(editor, [])
    box = editor.page.locator(".sd3-schedule svg").bounding_box()
    mouse, view = editor.page.mouse, "() => [app.canvas.ds.scale, ...app.canvas.ds.offset]"
    mouse.move(box["x"] + 20, box["y"] + 20)
    before = editor.page.evaluate(view)
    mouse.wheel(0, -120)
    editor.until(lambda: editor.page.evaluate(view)[0] > before[0])
    before = editor.page.evaluate(view)
    mouse.down(button="middle")
    mouse.move(box["x"] + 60, box["y"] + 50, steps=3)
    mouse.up(button="middle")
    editor.until(lambda: editor.page.evaluate(view)[1] > before[1])


@pytest.mark.long
def test_reports_reach_nodes_inside_a_subgraph(editor):
    opened(editor, seed=31)
    editor.page.evaluate(
        """(ids) => {
            const inside = ids.map((id) => app.graph.getNodeById(id));
            app.graph.convertToSubgraph(new Set(inside));
        }""",
        [PROMPT, SAMPLE],
    )
    editor.run()
    inner = """() => app.graph.nodes.find((node) => node.subgraph).subgraph.nodes
        .map((node) => node.widgets.find((w) => w.name === "sd3_report").element.innerText)"""
    for words in ("euler, 3 steps", "tokens"):
        editor.until(lambda words=words: any(words in text for text in editor.page.evaluate(inner)))


@pytest.mark.long
def test_reports_come_back_when_the_page_is_loaded_anew(editor):
    opened(editor)
    editor.page.evaluate("() => { app.graph.id = crypto.randomUUID(); }")
    editor.run()
    editor.page.wait_for_timeout(1500)  # until the page has stored its draft
    editor.visit()
    assert "euler, 3 steps" in report(editor, SAMPLE)
    assert "tokens" in report(editor, PROMPT)


@pytest.mark.long
def test_a_workflow_opened_from_the_history_shows_its_own_reports(editor):
    """As the queue panel's "load workflow" does it."""
    opened(editor, seed=21, steps=2)
    editor.run()
    opened(editor, seed=22, steps=5)
    editor.run()
    editor.page.evaluate(
        """async () => {
            const runs = Object.values(await (await fetch("/history")).json())
                .sort((a, b) => b.prompt[0] - a.prompt[0]);
            const run = runs.find(({ prompt }) => prompt[2]["5"]?.inputs.seed === 21);
            await app.loadGraphData(run.prompt[3].extra_pnginfo.workflow);
            app.nodeOutputs = run.outputs;
        }"""
    )
    editor.page.wait_for_timeout(500)
    assert "euler, 2 steps" in report(editor, SAMPLE)
