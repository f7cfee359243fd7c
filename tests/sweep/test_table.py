"""A sweep's rows and its labelled picture."""

import csv
import io

import pytest
import torch
from sd3_pack.sd3_core.embedded.captions import short_caption
from sd3_pack.sd3_core.embedded.model import MODEL_KEY, NAME
from sd3_pack.sd3_core.embedded.render import draw
from sd3_pack.sd3_core.embedded.scenes import scenes
from sd3_pack.sd3_core.pictures import to_uint8
from sd3_pack.sd3_core.sweep.axes import lay_out, read_axis
from sd3_pack.sd3_core.sweep.sheet import GAP, MARK, MOST, cell_size, labelled
from sd3_pack.sd3_core.sweep.table import Run, judged, make_table

LAYOUT = lay_out(read_axis("steps", "5, 10"), read_axis("encoders", "all, clip_l+t5"), reference=2)
RUNS = [Run(0.25 * number, 100 * number, 180.0 + number, 1.0 + number / 100) for number in range(4)]


def flat(level, batch=1, side=64):
    return torch.full((batch, side, side, 3), level, dtype=torch.uint8)


def test_rows_hold_what_was_measured():
    pictures = [flat(level) for level in (10, 40, 40, 43)]
    first, reference, _, last = make_table(LAYOUT, RUNS, pictures, prompt=None).values()
    assert first == {
        "cell": 1,
        "steps": 5,
        "encoders": "all",
        "seconds": 0.0,
        "peak_memory_mib": 0,
        "path_length": 180.0,
        "path_ratio": 1.0,
        "distance": 30.0,
    }
    assert reference["distance"] == 0
    assert (last["encoders"], last["distance"], last["path_ratio"]) == ("clip_l+t5", 3.0, 1.03)


def test_the_distance_is_that_of_each_picture_of_a_batch():
    other = torch.cat([flat(0), flat(50)])
    pictures = [other, torch.cat([flat(0), flat(10)]), other, other]
    assert make_table(LAYOUT, RUNS, pictures, prompt=None).values()[0]["distance"] == 20.0


def test_csv_and_text_tell_the_rows_again():
    table = make_table(LAYOUT, [*RUNS[:3], Run(1.0, None, 190.0, 1.1)], [flat(9)] * 4, prompt=None)
    lines = list(csv.DictReader(io.StringIO(table.csv())))
    assert [line["steps"] for line in lines] == ["5", "10", "5", "10"]
    assert lines[3]["peak_memory_mib"] == ""
    text = table.text().splitlines()
    assert text[0].startswith("| cell | steps | encoders | seconds | peak memory mib |")
    assert text[5] == "| 4 | 10 | clip_l+t5 | 1 | – | 190 | 1.1 | 0 |"
    assert "from cell 2" in text[-1]


def test_the_checker_judges_what_a_cell_shows():
    """Scenes drawn exactly are right for their own caption, and not for another's."""
    shown = scenes(3, range(40), (128, 128), kinds={"single": 1.0})
    one = shown[0]
    other = next(scene for scene in shown if scene.things[0].shape != one.things[0].shape)
    right, wrong = (to_uint8(draw([scene])) for scene in (one, other))
    pictures = [right, torch.cat([right, wrong]), wrong, right]
    rows = make_table(LAYOUT, RUNS, [pictures[0], wrong, wrong, right], short_caption(one)).values()
    assert [row["right"] for row in rows] == [1, 0, 0, 1]
    assert rows[0]["wrong"] == ""
    assert "shape:1" in rows[1]["wrong"]


def test_only_the_embedded_model_is_judged_and_only_on_its_world():
    embedded = {MODEL_KEY: NAME}
    assert judged(embedded, "a red circle") == ("a red circle", ())
    assert judged({}, "a red circle") == (None, ())
    prompt, (note,) = judged(embedded, "a lighthouse")
    assert prompt is None
    assert note.startswith('No score: "lighthouse"')


def test_the_grid_shows_every_cell_at_its_place():
    levels = (30, 80, 130, 180)
    sheet = labelled(LAYOUT, [flat(level, side=128) for level in levels])
    height, width, _ = sheet.shape
    left, top = width - 2 * (128 + GAP), height - 2 * (128 + GAP)
    for number, level in enumerate(levels):
        row, column = divmod(number, 2)
        x, y = left + column * (128 + GAP), top + row * (128 + GAP)
        assert (sheet[y : y + 128, x : x + 128] == level).all()
    assert (sheet[:top] < 100).any()  # the values of the columns
    assert (sheet[:, :left] < 100).any()
    assert torch.equal(sheet[top - 1, left + 128 + GAP + 60], torch.tensor(MARK, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("picture", "cells", "size"),
    [
        ((128, 128), (4, 2), (128, 128)),
        ((64, 48), (4, 2), (192, 144)),
        ((1024, 1024), (4, 2), (1024, 1024)),
        ((1024, 1024), (16, 1), (512, 512)),
        ((64, 64), (100, 1), (64, 64)),
    ],
)
def test_a_cell_is_shown_large_enough_and_the_whole_not_too_large(picture, cells, size):
    assert cell_size(*picture, *cells) == size
    assert cells[0] * size[0] <= MOST


def test_one_axis_has_no_names_at_the_side():
    sheet = labelled(lay_out(read_axis("steps", "5, 10")), [flat(0, side=128)] * 2)
    assert sheet.shape[1] == GAP + 2 * (128 + GAP)
