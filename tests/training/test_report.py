"""Reports stay readable, whatever they hold."""

from sd3_pack.sd3_core.training.report import Report, Skipped


def test_long_lists_are_cut_in_text_and_whole_in_json():
    skipped = tuple(Skipped(f"{n}.png", "it is broken") for n in range(100))
    pairs = tuple((f"{n}a", f"{n}b") for n in range(50))
    report = Report(1, 1, {(64, 32): 1}, skipped=skipped, near_duplicates=pairs)
    lines = report.lines()
    assert len(lines) == 1 + 21 + 21
    assert lines[0] == "1 picture, 1 draws an epoch; 64x32: 1"
    assert lines[1] == "skipped 0.png: it is broken"
    assert lines[21] == "... and 80 more such lines"
    assert lines[22] == "look alike: 0a, 0b"
    assert len(report.as_json()["skipped"]) == 100
