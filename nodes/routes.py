"""The one address that the page asks: the schedule that SD3 Shift Schedule's widgets describe.

So its curve follows the widgets before anything is run.  It only computes: no file, no state.
"""

import json
from collections.abc import Mapping
from functools import partial
from typing import Any

from aiohttp import web
from server import PromptServer

from ..sd3_core.errors import cut
from ..sd3_core.schedule import Schedule
from .errors import coded
from .sampling import schedule_report
from .threads import in_thread

ADDRESS = "/sd3_workbench/schedule"
MOST_STEPS = 1000  # more are no curve to look at, and would keep the server busy


def asked_schedule(query: Mapping[str, str]) -> dict[str, Any]:
    """What SD3 Shift Schedule would report.  query: its widgets.  Raises NodeError."""
    with coded("bad_setting"):
        missing = {"steps", "shift", "scheduler", "denoise"} - query.keys()
        if missing:
            raise ValueError(f"the query lacks {', '.join(sorted(missing))}.")
        steps, shift = int(query["steps"]), float(query["shift"])
        if steps > MOST_STEPS:
            raise ValueError(f"steps is {cut(steps)}; up to {MOST_STEPS} are drawn before a run.")
        sigmas = Schedule(shift).sigmas(steps, query["scheduler"], float(query["denoise"]))
    return schedule_report(shift, sigmas)


async def answer(request: web.Request) -> web.Response:
    try:
        told = await in_thread(asked_schedule, request.query)
        return web.json_response(told, dumps=partial(json.dumps, allow_nan=False))
    except ValueError as error:  # NodeError is one
        return web.json_response({"error": str(error)}, status=400)


def register() -> None:
    """Where a server runs; ComfyUI's library alone has none."""
    server = getattr(PromptServer, "instance", None)
    if server is not None:
        server.routes.get(ADDRESS)(answer)
