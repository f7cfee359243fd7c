"""A real ComfyUI on the CPU with this pack in it, and a client for its HTTP and websocket.

    with serve(folder) as server:
        entry = server.run(workflow)        # queue an API workflow, wait, its part of /history

Everything the server reads or writes lies in `folder`: models, input, output, temp, user,
custom_nodes, database, home.  The pack is linked in as `comfyui-sd3-workbench`; until its embedded
model exists, one with generated weights stands in its place.
"""

import asyncio
import json
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil

PACK = Path(__file__).parent.parent.parent
COMFYUI = Path(os.environ.get("COMFYUI_PATH") or Path.home() / "comfy" / "ComfyUI").expanduser()
HAS_COMFYUI = (COMFYUI / "main.py").is_file()
PACK_NAME = "comfyui-sd3-workbench"
MODEL_FOLDERS = (
    "checkpoints",
    "controlnet",
    "diffusion_models",
    "embeddings",
    "loras",
    "text_encoders",
    "vae",
)
REPORT = "sd3_report"  # key of our nodes' JSON in /history
START = 600  # seconds at most; about 20 on an idle core
DONE = ("execution_success", "execution_error", "execution_interrupted")


class ServerFailed(AssertionError):
    """With the end of the server's log."""


class Refused(Exception):
    """An answer that is no success: its status, and its JSON where it is JSON."""

    def __init__(self, status: int, body: Any):
        super().__init__(f"{status}: {body}")
        self.status, self.body = status, body


@dataclass(frozen=True)
class Event:
    """One websocket message: JSON, or a binary frame with its type number in front."""

    type: str  # of JSON; "preview" for binary
    data: Any  # JSON, or bytes
    arrived: float  # time.monotonic()


@dataclass
class Listener:
    """A websocket of one client, read in a thread."""

    url: str
    client_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    seen: list[Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._inbox: queue.Queue[Event | Exception] = queue.Queue()
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._ready.wait(30), "the websocket did not open"

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._read())
        except (aiohttp.ClientError, asyncio.CancelledError, OSError) as error:
            self._inbox.put(ConnectionError(f"the websocket closed: {error!r}"))
        finally:
            self._ready.set()

    async def _read(self) -> None:
        self._task = asyncio.current_task()
        address = f"{self.url.replace('http', 'ws', 1)}/ws?clientId={self.client_id}"
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(address, max_msg_size=0) as socket,
        ):
            flags = {"supports_preview_metadata": True}
            await socket.send_json({"type": "feature_flags", "data": flags})
            async for message in socket:
                self._ready.set()  # the server answers the first message
                if message.type == aiohttp.WSMsgType.TEXT:
                    told = json.loads(message.data)
                    kind, data = told["type"], told["data"]
                elif message.type == aiohttp.WSMsgType.BINARY:
                    number = int.from_bytes(message.data[:4], "big")
                    kind = {1: "preview", 3: "text", 4: "preview"}.get(number, str(number))
                    data = message.data[4:]
                else:
                    continue
                self._inbox.put(Event(kind, data, time.monotonic()))
        self._inbox.put(ConnectionError("the websocket closed"))

    def next(self, timeout: float) -> Event:
        """The next message.  Raises queue.Empty, or ConnectionError after the last."""
        event = self._inbox.get(timeout=timeout)
        if isinstance(event, Exception):
            raise event
        self.seen.append(event)
        return event

    def until(self, kinds: Sequence[str] | str, prompt_id: str = "", timeout: float = 300) -> Event:
        """The next message of one of these kinds, of this prompt where one is named."""
        kinds = (kinds,) if isinstance(kinds, str) else kinds
        end = time.monotonic() + timeout
        while True:
            event = self.next(max(0.01, end - time.monotonic()))
            of = event.data.get("prompt_id") if isinstance(event.data, dict) else None
            if event.type in kinds and (not prompt_id or of in (None, prompt_id)):
                return event

    def of(self, kind: str, prompt_id: str = "") -> list[Event]:
        """What has been seen so far of one kind."""
        return [
            event
            for event in self.seen
            if event.type == kind
            and (
                not prompt_id
                or not isinstance(event.data, dict)
                or event.data.get("prompt_id") in (None, prompt_id)
            )
        ]

    def close(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._task.cancel)
            self._thread.join(10)


@dataclass
class Server:
    url: str
    folder: Path
    process: subprocess.Popen[bytes]
    log: Path

    def request(self, path: str, body: Any = None, method: str | None = None) -> Any:
        """The JSON (or bytes) of an answer; a body makes it a POST.  Raises Refused."""
        data = None if body is None else json.dumps(body).encode()
        headers = {} if body is None else {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return _decoded(answer.read())
        except urllib.error.HTTPError as error:
            raise Refused(error.code, _decoded(error.read())) from None

    def listen(self) -> Listener:
        return Listener(self.url)

    def queue(self, workflow: Mapping[str, Any], client_id: str = "", preview: str = "") -> str:
        """Queue an API workflow; returns its prompt_id.  Raises Refused (400) with node_errors.

        preview: "latent2rgb" for preview pictures over the websocket.
        """
        extra = {"preview_method": preview} if preview else {}
        body = {"prompt": workflow, "client_id": client_id, "extra_data": extra}
        return self.request("/prompt", body)["prompt_id"]

    def history(self, prompt_id: str) -> dict[str, Any] | None:
        return self.request(f"/history/{prompt_id}").get(prompt_id)

    def wait(self, prompt_id: str, timeout: float = 300) -> dict[str, Any]:
        """The prompt's part of /history, once it ended, however it ended."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise ServerFailed(f"the server ended.\n{self.tail()}")
            if (entry := self.history(prompt_id)) is not None:
                return entry
            time.sleep(0.05)
        raise ServerFailed(f"{prompt_id} did not end within {timeout:g} s.\n{self.tail()}")

    def run(self, workflow: Mapping[str, Any], timeout: float = 300) -> dict[str, Any]:
        """Queue, wait, insist on success; returns its part of /history."""
        entry = self.wait(self.queue(workflow), timeout)
        if entry["status"]["status_str"] != "success":
            raise ServerFailed(f"{error_of(entry)}\n{self.tail()}")
        return entry

    def refusal(self, workflow: Mapping[str, Any]) -> str:
        """What is said of a bad workflow, before it starts or while it runs; "" if it is good."""
        try:
            return error_of(self.wait(self.queue(workflow)))
        except Refused as refused:
            nodes = refused.body["node_errors"].values()
            errors = [error for node in nodes for error in node["errors"]]
            return "\n".join(f"{error['message']}: {error['details']}" for error in errors)

    def our_nodes(self) -> dict[str, dict[str, Any]]:
        """Node id -> its /object_info, of the nodes that come from this pack."""
        module = f"custom_nodes.{PACK_NAME}"
        info = self.request("/object_info")
        return {name: node for name, node in info.items() if node["python_module"] == module}

    def picture(self, entry: Mapping[str, Any], node: str = "save") -> bytes:
        """The first picture that a node saved, as its file's bytes."""
        query = urllib.parse.urlencode(entry["outputs"][node]["images"][0])
        return self.request(f"/view?{query}")

    def interrupt(self, prompt_id: str = "") -> None:
        self.request("/interrupt", {"prompt_id": prompt_id} if prompt_id else {})

    def free(self) -> None:
        """Ask for everything to be unloaded; it happens when the queue is idle."""
        self.request("/free", {"unload_models": True, "free_memory": True})

    def memory(self) -> int:
        """Resident bytes of the server's process."""
        return psutil.Process(self.process.pid).memory_info().rss

    def tail(self, lines: int = 60) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


def _decoded(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return content


def error_of(entry: Mapping[str, Any]) -> str:
    """What an execution_error in /history says; empty when there is none."""
    for kind, data in entry["status"]["messages"]:
        if kind == "execution_error":
            return f"{data['node_type']}: {data['exception_message']}"
    return ""


def cached_of(entry: Mapping[str, Any]) -> set[str]:
    """The nodes whose results came from the cache."""
    return {
        node
        for kind, data in entry["status"]["messages"]
        if kind == "execution_cached"
        for node in data["nodes"]
    }


def reports(entry: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Node -> what it tells in /history."""
    told = {name: output[REPORT] for name, output in entry["outputs"].items() if REPORT in output}
    assert all(len(report) == 1 for report in told.values())
    return {name: report[0] for name, report in told.items()}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def lay_out(folder: Path) -> None:
    """The folders of an empty installation with the pack linked in; what is there stays."""
    for name in MODEL_FOLDERS:
        (folder / "models" / name).mkdir(parents=True, exist_ok=True)
    for name in ("input", "output", "temp", "custom_nodes", "user/default"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    settings = folder / "user" / "default" / "comfy.settings.json"
    if not settings.exists():  # else the template dialog covers every page
        settings.write_text(json.dumps({"Comfy.TutorialCompleted": True}), encoding="utf-8")
    link_pack(folder / "custom_nodes" / PACK_NAME)


def link_pack(place: Path) -> None:
    """The pack by links; by copies where they are not allowed, as on Windows for most users."""
    if place.exists():
        return
    place.mkdir()
    for entry in PACK.iterdir():
        if entry.name.startswith(".") or entry.name == "output":
            continue
        copy = place / entry.name
        try:
            copy.symlink_to(entry)
        except OSError:
            if entry.is_dir():
                shutil.copytree(entry, copy, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(entry, copy)


@contextmanager
def serve(
    folder: Path,
    port: int | None = None,
    args: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    comfyui: Path = COMFYUI,
    python: str = sys.executable,
) -> Iterator[Server]:
    """A running server; a second one in the same folder is a restart.

    args: more of main.py's.  environment: variables on top of this process's.  The log is
    `folder/server.log` (appended), and its end is printed when the block fails.
    """
    lay_out(folder)
    port = port or free_port()
    log = folder / "server.log"
    command = [
        *(python, "main.py", "--cpu", "--port", str(port), "--disable-auto-launch"),
        *("--base-directory", str(folder), "--disable-api-nodes"),
        *("--database-url", f"sqlite:///{folder / 'user' / 'comfyui.db'}", *args),
    ]
    home = folder / "home"
    variables = {
        "OMP_NUM_THREADS": "1",
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "COMFYUI_PATH": str(comfyui),
        "HOME": str(home),
        "XDG_CACHE_HOME": str(home / ".cache"),
        "SD3_WORKBENCH_PROMPT_CACHE": "",  # the usual place, in this home
        **(environment or {}),
    }
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            cwd=comfyui,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = Server(f"http://127.0.0.1:{port}", folder, process, log)
    try:
        _wait_until_ready(server)
        yield server
    except BaseException:
        print(f"--- the server's log, {log}:\n{server.tail()}", file=sys.stderr)  # noqa: T201
        raise
    finally:
        _stop(process)


def _wait_until_ready(server: Server) -> None:
    end = time.monotonic() + START
    while time.monotonic() < end:
        if server.process.poll() is not None:
            raise ServerFailed(f"the server did not start.\n{server.tail()}")
        try:
            server.request("/api/system_stats")
            return
        except (OSError, Refused):
            time.sleep(0.2)
    raise ServerFailed(f"the server was not ready after {START} s.\n{server.tail()}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """The whole process group: the server and whatever it started."""
    if not hasattr(os, "killpg"):
        process.kill()
        process.wait()
        return
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(10)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue
