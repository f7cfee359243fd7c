"""What the start of a server decides, and that a restart changes nothing."""

from pathlib import Path

from api_workflows import text_to_image
from comfy_server import PACK, link_pack, reports, serve


def test_a_restart_draws_the_same_and_a_switch_leaves_training_out(tmp_path):
    """One server without training, then one with it, in the same folder."""
    workflow = text_to_image(seed=201)
    with serve(tmp_path, environment={"SD3_WORKBENCH_NO_TRAINING": "1"}) as first:
        without = first.our_nodes()
        told = reports(first.run(workflow))
        drawn = first.picture(first.run(workflow))
    with serve(tmp_path) as second:
        every = second.our_nodes()
        entry = second.run(workflow)
        assert second.picture(entry) == drawn
        assert reports(entry).keys() == told.keys()
        assert reports(entry)["load"] == told["load"]
    assert set(without) == {name for name, node in every.items() if not trains_or_writes(node)}


def trains_or_writes(node) -> bool:
    return node["output_node"] or node["category"].startswith("SD3 Workbench/training")


def test_nothing_is_written_outside_the_places_that_the_readme_names(server):
    server.run(text_to_image(seed=202, prompt="one green star"))
    home = server.folder / "home"
    written = {path.relative_to(home) for path in home.rglob("*") if path.is_file()}
    cache = home / ".cache" / "sd3-workbench" / "prompts"
    assert any(cache.iterdir())
    assert all((home / path).is_relative_to(cache) for path in written), written


def test_where_links_are_not_allowed_the_pack_is_copied(tmp_path, monkeypatch):
    """As on Windows, without its developer mode."""

    def refuse(*_args, **_options):
        raise OSError(1314, "A required privilege is not held by the client")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    link_pack(tmp_path / "pack")
    for name in ("__init__.py", "nodes/__init__.py", "web/workbench.js"):
        copy = tmp_path / "pack" / name
        assert not copy.is_symlink()
        assert copy.read_bytes() == (PACK / name).read_bytes()
