"""Threads in which this pack answers: few, and not those that ComfyUI's own addresses use.

A thread that was begun runs to its end, whether somebody still waits for its answer or not.  In the
event loop's pool a flood of abandoned requests kept every other address waiting.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from aiohttp import web

THREADS = 4
MOST_WAITING = 32  # requests, those being answered included; somebody who clicks has one
AGAIN = 2  # seconds

P = ParamSpec("P")
T = TypeVar("T")

_POOL = ThreadPoolExecutor(THREADS, thread_name_prefix="sd3-workbench")
_WAITING: set[Future] = set()


async def in_thread(work: Callable[P, T], *given: P.args, **named: P.kwargs) -> T:
    """What `work` returns or raises.  Raises HTTPServiceUnavailable where too many wait already."""
    if len(_WAITING) >= MOST_WAITING:
        raise web.HTTPServiceUnavailable(
            text='{"error": "too many requests at once; ask again in a moment."}',
            content_type="application/json",
            headers={"Retry-After": str(AGAIN)},
        )
    future = _POOL.submit(work, *given, **named)
    _WAITING.add(future)
    future.add_done_callback(_WAITING.discard)
    return await asyncio.wrap_future(future)
