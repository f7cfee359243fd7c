"""What the start of a server decides, and that a restart changes nothing."""

from api_workflows import text_to_image
from comfy_server import reports, serve


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
