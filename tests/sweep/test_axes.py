"""Axes: what their text means, what is refused, which cells they span."""

import pytest
from sd3_pack.sd3_core.sweep.axes import (
    AXES,
    MOST_CELLS,
    Axis,
    check_axes,
    lay_out,
    read_axis,
    written,
)
from sd3_pack.sd3_core.text.encoders import ENCODERS

MODEL = {
    "depth": 4,
    "encoders": ENCODERS,
    "loras": True,
    "skip_scale": 0.0,
    "skip_layers": (1,),
}


@pytest.mark.parametrize(
    ("name", "text", "values"),
    [
        ("steps", "10, 20,40", (10, 20, 40)),
        ("cfg", "1,4.5\n7", (1.0, 4.5, 7.0)),
        ("sampler", "euler, heun", ("euler", "heun")),
        (
            "encoders",
            "all, T5 + clip_l, clip_g, none",
            (ENCODERS, ("clip_l", "t5"), ("clip_g",), ()),
        ),
        ("skip_layers", "9+7+8, none", ((7, 8, 9), ())),
        ("seed", "18446744073709551615", (2**64 - 1,)),
    ],
)
def test_values_are_read_as_they_are_written(name, text, values):
    axis = read_axis(name, text)
    assert axis == Axis(name, values)
    assert read_axis(name, ", ".join(map(written, values))) == axis


@pytest.mark.parametrize("name", AXES)
def test_the_example_of_every_axis_is_read(name):
    assert len(read_axis(name, AXES[name].example).values) > 1


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("step", "1", "the axis is 'step'; choose one of steps, cfg"),
        ("steps", "10, many", "steps: 'many' is no value of it; expected whole numbers from 1"),
        ("steps", "0", "'0' is no value"),
        ("steps", "1.5", "'1.5' is no value"),
        ("cfg", "nan", "'nan' is no value"),
        ("shift", "0", "'0' is no value"),
        ("sampler", "ddim", "'ddim' is no value of it; expected names out of euler"),
        ("encoders", "clip_l+bert", "'clip_l\\+bert' is no value"),
        ("skip_layers", "7-9", "'7-9' is no value"),
        ("cfg", "3, 3.0", "cfg: 3 is there twice"),
        ("steps", " , ", "steps has no values; write whole numbers from 1, such as 10, 20, 40"),
    ],
)
def test_what_is_no_value_is_refused_with_what_would_be(name, text, message):
    with pytest.raises(ValueError, match=message):
        read_axis(name, text)


def test_cells_are_counted_as_the_grid_is_read():
    layout = lay_out(read_axis("steps", "5, 10"), read_axis("cfg", "1, 3"), reference=0)
    assert [(cell.number, dict(cell.choice)) for cell in layout.cells] == [
        (1, {"steps": 5, "cfg": 1.0}),
        (2, {"steps": 10, "cfg": 1.0}),
        (3, {"steps": 5, "cfg": 3.0}),
        (4, {"steps": 10, "cfg": 3.0}),
    ]
    assert layout.cells[3].label == "steps 10, cfg 3"
    assert layout.reference == 4


def test_one_axis_makes_one_row():
    assert [dict(cell.choice) for cell in lay_out(read_axis("seed", "1, 2")).cells] == [
        {"seed": 1},
        {"seed": 2},
    ]


def test_a_layout_that_cannot_be_is_refused():
    steps = read_axis("steps", ", ".join(map(str, range(1, 12))))
    with pytest.raises(ValueError, match="both axes are steps"):
        lay_out(steps, steps)
    with pytest.raises(ValueError, match=f"110 cells; {MOST_CELLS} is the most"):
        lay_out(steps, read_axis("seed", ", ".join(map(str, range(10)))))
    with pytest.raises(ValueError, match="the reference is cell 12; there are the cells 1 to 11"):
        lay_out(steps, reference=12)


@pytest.mark.parametrize(
    ("axes", "model", "message"),
    [
        (("encoders", "clip_l, all"), {"encoders": ("clip_l", "clip_g")}, "all: T5 is not loaded"),
        (("lora_strength", "0, 1"), {"loras": False}, "without a LoRA"),
        (("skip_layers", "1, 2"), {}, "skip-layer guidance is off"),
        (("skip_layers", "1, 4"), {"skip_scale": 2.0}, r"skip layers \[4\].*blocks 0 to 3"),
        (("skip_scale", "0, 2"), {"skip_layers": (7,)}, r"skip layers \[7\].*blocks 0 to 3"),
        (("skip_scale", "0, 2"), {"skip_layers": ()}, "no layer is skipped"),
    ],
)
def test_what_this_model_cannot_vary_is_refused(axes, model, message):
    check_axes(lay_out(read_axis("steps", "1, 2")), **MODEL)
    with pytest.raises(ValueError, match=message):
        check_axes(lay_out(read_axis(*axes)), **{**MODEL, **model})
