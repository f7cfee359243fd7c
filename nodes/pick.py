"""SD3 Pick: candidates go into a backlog, the person picks on the node whenever they like.

Nothing waits: the node hands its pictures on and the votes come later, by the two addresses below.
"""

import io as streams
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import folder_paths
import torch
from aiohttp import web
from comfy_api.latest import io
from PIL import Image
from server import PromptServer
from torch import Tensor

from ..sd3_core.embedded.requests import parse
from ..sd3_core.embedded.score import judge_pictures
from ..sd3_core.errors import cut, quoted
from ..sd3_core.reading import LARGEST_PICTURE, read_regular
from ..sd3_core.training.picks import MOST, PICTURES, Group, PickRefused, Picks, different
from ..sd3_core.training.run import named_folder
from ._compat import advanced, schema
from .errors import NodeError, coded, without_places
from .threads import in_thread
from .wires import CATEGORY, checked_images, loras_on, origin_of, report

HOME = "sd3_picks"  # in ComfyUI's output folder
ADDRESS = "/sd3_workbench/picks/{name}"
LARGEST_BODY = 4096  # bytes of a vote
ME, CHECKER = "me", "checker"  # who votes
UNKNOWN = -1  # seed
FIELDS = {"group", "best", "worst", "verdict", "undo"}


def pick_folder(name: str) -> Path:
    """Raises ValueError for a name that is no plain folder name."""
    return named_folder(Path(folder_paths.get_output_directory()) / HOME, name, "pick_name")


# Addresses


def state(picks: Picks, reveal: bool = False) -> dict[str, Any]:
    """What the node shows: the next group, how many wait, what a blind comparison says.

    Pictures come in a shuffled order and without their arms; ComfyUI's /view serves them.
    reveal: tell the comparison while pictures wait.  Else it stays hidden until then: a tally seen
    after each vote sways the next ones, and stopping at a lucky one voids the interval.
    """
    waiting = picks.open_groups()
    comparison = picks.comparison()
    following = None
    if waiting:
        group = waiting[0]
        following = {"id": group.id, "prompt": group.prompt, "pictures": group.shown()}
    hidden = comparison is not None and bool(waiting) and not reveal
    return {
        "group": following,
        "open": len(waiting),
        "decided": len(picks.votes()),
        "comparison": None if comparison is None or hidden else asdict(comparison),
        "hidden": hidden,
        "problem": " ".join(filter(None, (too_many(picks.arms()), passed_over(picks)))),
        "subfolder": f"{HOME}/{picks.folder.name}/{PICTURES}",
    }


def too_many(arms: Sequence[str]) -> str:
    if len(arms) <= 2:
        return ""
    return (
        f"This folder holds {len(arms)} labels ({cut(', '.join(arms))}), and a comparison has two: "
        "take another pick_name for each comparison."
    )


def passed_over(picks: Picks) -> str:
    lines = picks.passed_over()
    if not lines:
        return ""
    return (
        f"{len(lines)} {'line' if len(lines) == 1 else 'lines'} of this folder's files cannot be "
        f"used and {'is' if len(lines) == 1 else 'are'} passed over; the first: {lines[0]}."
    )


def read_vote(body: bytes) -> dict[str, Any]:
    """Raises ValueError for anything but a small object of the known fields, all text."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError("the body is no JSON.") from error
    if not isinstance(fields, dict) or set(fields) - FIELDS:
        raise ValueError(f"expected an object of {', '.join(sorted(FIELDS))}.")
    if any(name != "undo" and not isinstance(value, str) for name, value in fields.items()):
        raise ValueError("group, best, worst and verdict are text.")
    if fields.get("undo", True) is not True or ("undo" in fields) == ("group" in fields):
        raise ValueError('give a group with its vote, or {"undo": true}.')
    return fields


def cast_vote(picks: Picks, fields: dict[str, Any]) -> dict[str, Any]:
    if "undo" in fields:
        picks.undo()
    else:
        known = {name: fields.get(name, "") for name in ("best", "worst", "verdict")}
        picks.vote(fields["group"], **known)
    return state(picks)


async def answered(request: web.Request, work: Callable[[Picks], dict[str, Any]]) -> web.Response:
    """The work's answer as JSON; 400 for a name that is none, 409 for a vote that is refused, 503
    where too many wait, 507 where the disk does not take it."""
    try:
        folder = pick_folder(request.match_info["name"])
    except ValueError as error:
        return web.json_response({"error": without_places(str(error))}, status=400)
    try:
        return web.json_response(await in_thread(work, Picks(folder)))
    except PickRefused as error:
        return web.json_response({"error": str(error)}, status=409)
    except OSError as error:
        told = f"the folder {folder.name} cannot be used: {error.strerror or error}."
        return web.json_response({"error": told}, status=507)


async def show(request: web.Request) -> web.Response:
    return await answered(request, lambda picks: state(picks, reveal="reveal" in request.query))


async def vote(request: web.Request) -> web.Response:
    if request.content_type != "application/json":  # no other page's form can send it
        return web.json_response({"error": "send application/json."}, status=415)
    body = b""
    while part := await request.content.read(LARGEST_BODY + 1 - len(body)):
        body += part  # it may come in pieces
    if len(body) > LARGEST_BODY:
        return web.json_response({"error": f"a vote has at most {LARGEST_BODY} bytes."}, status=413)
    try:
        fields = read_vote(body)
    except ValueError as error:
        return web.json_response({"error": str(error)}, status=400)
    return await answered(request, lambda picks: cast_vote(picks, fields))


def register() -> None:
    """Where a server runs; ComfyUI's library alone has none."""
    server = getattr(PromptServer, "instance", None)
    if server is not None:
        server.routes.get(ADDRESS)(show)
        server.routes.post(ADDRESS)(vote)


# Node


def png(pixels: Tensor) -> bytes:
    """[H, W, 3] in 0..1 -> a PNG without any metadata: it must not tell who drew it."""
    levels = (pixels.detach().float().cpu() * 255).round().clamp(0, 255).byte().numpy()
    data = streams.BytesIO()
    Image.fromarray(levels).save(data, format="PNG", compress_level=4)
    return data.getvalue()


def grouped(pictures: Sequence[bytes]) -> list[Sequence[bytes]]:
    """Different candidates of one prompt in groups of 2 to 4, as even as can be."""
    count = -(-len(pictures) // MOST)
    size, larger = divmod(len(pictures), count)
    groups, start = [], 0
    for number in range(count):
        end = start + size + (number < larger)
        groups.append(pictures[start:end])
        start = end
    return groups


def add_candidates(
    picks: Picks,
    images: Tensor,
    rivals: Tensor | None,
    arms: tuple[str, str],
    prompt: str,
    seed: int | None,
    models: tuple[str, str],
) -> list[Group]:
    """Raises NodeError and PickRefused for pictures that cannot be compared."""
    own = [png(pixels) for pixels in checked_images("images", images)]
    if rivals is None:
        if len(own) < 2:
            raise NodeError(
                "bad_setting",
                "one picture is no choice: draw a batch of 2 to 4 for the prompt, or connect "
                "images_b to compare two settings.",
            )
        return [
            picks.add(prompt, one, seed=seed, model=models[0], places=list(map(own.index, one)))
            for one in grouped(different(own))
        ]
    if len(own) != len(rivals):
        raise NodeError(
            "bad_setting",
            f"images has {len(own)} pictures and images_b {len(rivals)}: a blind comparison needs "
            "as many of each, drawn with the same prompts and seeds.",
        )
    if arms[0] == arms[1]:
        raise NodeError(
            "bad_setting", f"label_a and label_b are both {quoted(arms[0])}; name them apart."
        )
    pairs = zip(own, map(png, checked_images("images_b", rivals)), strict=True)
    each = models if models[0] != models[1] else ()
    model = "" if each else models[0]
    return [
        picks.add(
            prompt, pair, arms=arms, seed=seed, model=model, models=each, places=(place, place)
        )
        for place, pair in enumerate(pairs)
    ]


def named(model: Any) -> str:
    """The file of a MODEL and the LoRAs on it: "medium.safetensors + mine.safetensors x 0.8"."""
    file = origin_of(model).files.get("mmdit", {}).get("file", "a model of another loader")
    return " + ".join([file, *loras_on(model)])


def check_judged(judge: str, prompt: str) -> None:
    """Raises NodeError for a prompt that the checker cannot judge."""
    if judge == CHECKER:
        try:
            parse(prompt)
        except ValueError as error:
            raise NodeError(
                "bad_setting",
                f"judge is {CHECKER}, which knows the embedded model's world alone: {error} "
                f"Choose {ME}, or a prompt of that world.",
            ) from error


def let_checker_vote(picks: Picks, groups: Sequence[Group]) -> None:
    """On those that are open: a right picture goes before a wrong one."""
    waiting = {group.id for group in picks.open_groups()}
    for group in groups:
        if group.id in waiting:
            right = {
                name
                for name in group.pictures
                if judge_pictures(stored(picks, name), [group.prompt])[0].right
            }
            picks.judge(group.id, right, by=CHECKER)


def stored(picks: Picks, name: str) -> Tensor:
    """A picture of the folder, [1, 3, H, W] in -1..1."""
    data = read_regular(picks.folder / PICTURES / name, LARGEST_PICTURE)
    with Image.open(streams.BytesIO(data), formats=["PNG"]) as picture:
        size, data = picture.size, picture.convert("RGB").tobytes()
    pixels = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(1, size[1], size[0], 3)
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


class SD3Pick(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return schema(
            {
                "node_id": "SD3Pick",
                "display_name": "SD3 Pick",
                "category": f"{CATEGORY}/training",
                "description": "Collect pictures and pick the better ones on the node, now or "
                "tomorrow: the queue never waits. The picks are pairs for SD3 Preferences. With "
                "images_b it is a blind comparison of two settings.",
                "search_aliases": ["vote", "choose", "rate", "compare", "a/b test", "preference"],
                "is_output_node": True,
                "inputs": [
                    io.Image.Input(
                        "images", tooltip="Candidates that one prompt made, 2 to 4 a choice."
                    ),
                    io.String.Input(
                        "pick_name",
                        default="my-picks",
                        tooltip="Names the folder of the picks, output/sd3_picks/NAME.",
                    ),
                    io.String.Input(
                        "prompt",
                        multiline=True,
                        default="",
                        tooltip="What the pictures were drawn from; it is stored with the picks.",
                    ),
                    *advanced(
                        [
                            io.Image.Input(
                                "images_b",
                                optional=True,
                                tooltip="The same prompts and seeds with another setting or model.",
                            ),
                            io.String.Input(
                                "label_a",
                                default="A",
                                optional=True,
                                tooltip="Names the setting of images; not shown before the vote.",
                            ),
                            io.String.Input(
                                "label_b",
                                default="B",
                                optional=True,
                                tooltip="Names the setting of images_b.",
                            ),
                            io.Int.Input(
                                "seed",
                                default=UNKNOWN,
                                min=UNKNOWN,
                                max=2**64 - 1,
                                control_after_generate=False,  # it tells, it draws nothing
                                optional=True,
                                tooltip="Of the pictures; stored with the picks. -1: not known.",
                            ),
                            io.Model.Input(
                                "model",
                                optional=True,
                                tooltip="What drew them; its file and its LoRAs are stored with "
                                "the picks.",
                            ),
                            io.Combo.Input(
                                "judge",
                                options=[ME, CHECKER],
                                default=ME,
                                optional=True,
                                tooltip="checker: the embedded model's own votes at once, what is "
                                "as asked before what is not, all alike a tie. Only for prompts "
                                "of its world.",
                            ),
                            io.Model.Input(
                                "model_b",
                                optional=True,
                                tooltip="What drew images_b, where it is not model.",
                            ),
                        ]
                    ),
                ],
                "outputs": [io.Image.Output(tooltip="The pictures as they came.")],
            }
        )

    @classmethod
    def validate_inputs(cls, pick_name: str) -> bool | str:
        try:
            if pick_name is not None:
                pick_folder(pick_name)
        except ValueError as error:
            return str(NodeError("bad_setting", str(error)))
        return True

    @classmethod
    def execute(
        cls,
        images: Tensor,
        pick_name: str,
        prompt: str,
        images_b: Tensor | None = None,
        label_a: str = "A",
        label_b: str = "B",
        seed: int = UNKNOWN,
        model: Any = None,
        judge: str = ME,
        model_b: Any = None,
    ) -> io.NodeOutput:
        check_judged(judge, prompt)
        with coded("bad_setting"):
            picks = Picks(pick_folder(pick_name))
            first = "" if model is None else named(model)
            models = (first, first if model_b is None else named(model_b))
            arms = (label_a.strip(), label_b.strip())
            known = None if seed == UNKNOWN else seed
            groups = add_candidates(picks, images, images_b, arms, prompt.strip(), known, models)
            if judge == CHECKER:
                let_checker_vote(picks, groups)
        shown = state(picks)
        contents = {
            "pick_name": pick_name,
            "added": len(groups),
            "open": shown["open"],
            "decided": shown["decided"],
            "comparison": shown["comparison"],
            "problem": shown["problem"],
        }
        return io.NodeOutput(images, ui=report(contents))
