"""Set up and try SD3 Workbench on a fresh machine, with nothing but Python 3.10 or newer.

python dev.py demo [PROMPT]              make a picture and say where it lies
python dev.py test [--all] [ARGUMENTS]   lint, types and tests; ARGUMENTS go to pytest alone
                                         (--all adds the long tests, and plainer arithmetic)
python dev.py counts                     what a step asks of a card, into docs/performance.md

All keep what they install in .venv beside this file. Standard library only.
"""

from __future__ import annotations  # so that an older Python gets as far as being told its age

import argparse
import configparser
import contextlib
import hashlib
import io
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
PICTURE = ROOT / "demo.png"
SEED = "1"  # of the demo's picture
OLDEST_PYTHON = (3, 10)

RUNTIME = ("torch==2.11.0",)
TORCH_COMPANIONS = ("torchvision==0.26.0", "torchaudio==2.11.0")  # ComfyUI wants all three to match
CHECKERS = (
    "pytest==9.2.0",
    "pytest-xdist==3.8.0",
    "ruff==0.17.5",
    "basedpyright==1.40.2",
    "playwright==1.65.2",
)
# The oldest processor that is served: no AVX-512 and no bfloat16 products, sums in another order.
PLAIN_ARITHMETIC = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "AVX2"}
# Two processes, as each starts servers and browsers besides; conftest.py says what stays together.
SIDE_BY_SIDE = ("-n", "2")
ORACLES = (
    'diffusers==0.42.1; python_version >= "3.11"',
    'diffusers==0.41.0; python_version < "3.11"',  # the last release for Python 3.10
    "peft==0.21.2",
    "accelerate==1.15.0",
    "matplotlib==3.10.7",  # the figures of bench and study
)

NO_NETWORK_SIGNS = (
    "Failed to establish a new connection",
    "Temporary failure in name resolution",
    "Name or service not known",
    "getaddrinfo failed",
    "nodename nor servname",
    "Network is unreachable",
    "Connection refused",
    "Cannot connect to proxy",
    "ConnectTimeoutError",
    "Read timed out",
    "(from versions: none)",  # every package here is on PyPI, so nobody answered
)


class SetupError(Exception):
    """The machine lacks something: the message is one sentence that says what to do."""


# --- the environment --------------------------------------------------------------------------


def check_interpreter(version: tuple[int, int] = sys.version_info[:2]) -> None:
    if version < OLDEST_PYTHON:
        raise SetupError(
            f"this is Python {version[0]}.{version[1]}, but SD3 Workbench needs "
            f"{OLDEST_PYTHON[0]}.{OLDEST_PYTHON[1]} or newer: run dev.py with a newer one."
        )


def find_comfyui() -> Path | None:
    """ComfyUI's checkout: COMFYUI_PATH, else the first of comfy-cli's places, else None."""
    named = os.environ.get("COMFYUI_PATH")
    for place in [Path(named).expanduser()] if named else comfy_cli_places():
        if (place / "requirements.txt").is_file() and (place / "comfy").is_dir():
            return place.resolve()
    if named:
        raise SetupError(f"COMFYUI_PATH is {named}, which holds no ComfyUI checkout.")
    return None


def comfy_cli_places() -> list[Path]:
    """Where comfy-cli looks (as of 1.23): `comfy set-default`, the last used, where it installs."""
    home = Path.home()
    settings = {
        "win32": home / "AppData" / "Local",
        "darwin": home / "Library" / "Application Support",
    }.get(sys.platform, home / ".config")
    config = configparser.ConfigParser(interpolation=None)
    with contextlib.suppress(configparser.Error, UnicodeDecodeError):  # torn: as if it had none
        config.read(settings / "comfy-cli" / "config.ini")
    told = [config.defaults().get(key) for key in ("default_workspace", "recent_workspace")]
    installed = (home / "comfy" / "ComfyUI", home / "Documents" / "comfy" / "ComfyUI")
    return [*(Path(place) for place in told if place), *installed]


def wanted(purpose: str) -> list[str]:
    """pip's arguments for "demo" (what a picture needs) or "test" (that, and all the rest).

    Where there is a ComfyUI, both run in it and need what it needs.
    """
    comfyui, tested = find_comfyui(), purpose == "test"
    packages: list[str] = list(RUNTIME)
    if comfyui or tested:
        packages += TORCH_COMPANIONS
    if tested:
        packages += [*CHECKERS, *ORACLES]
    files = [ROOT / "requirements.txt", *([comfyui / "requirements.txt"] if comfyui else [])]
    return packages + [argument for file in files for argument in ("-r", str(file))]


def digest(arguments: Sequence[str]) -> str:
    """One value for a list of pip arguments and for the contents of the files among them."""
    value = hashlib.sha256()
    for argument in arguments:
        file = Path(argument)
        value.update(file.read_bytes() if file.is_file() else argument.encode())
        value.update(b"\n")
    return value.hexdigest()


def stamp(purpose: str) -> Path:
    return VENV / f"sd3-workbench-{purpose}.stamp"


def is_installed(purpose: str) -> bool:
    file = stamp(purpose)
    return file.is_file() and file.read_text(encoding="ascii") == digest(wanted(purpose))


def prepare(purpose: str) -> None:
    """Make .venv hold what the purpose needs; a second call finds the stamp and returns.

    Raises SetupError when the environment cannot be made, is broken, or pip fails.
    """
    check_interpreter()
    if not PYTHON.exists():
        create_environment()
    check_environment()
    if is_installed(purpose) or is_installed("test"):
        return
    install(wanted(purpose))
    stamp(purpose).write_text(digest(wanted(purpose)), encoding="ascii")


def create_environment() -> None:
    print(f"creating {VENV}", flush=True)
    found_something = VENV.exists()
    made = subprocess.run(
        [sys.executable, "-m", "venv", str(VENV)], capture_output=True, text=True, errors="replace"
    )
    if made.returncode:
        if not found_something:
            shutil.rmtree(VENV, ignore_errors=True)  # half an environment would pass for a whole
        print((made.stdout + made.stderr).strip(), file=sys.stderr)
        raise SetupError(
            "Python could not create a virtual environment (on Debian and Ubuntu, "
            "`apt install python3-venv` brings the missing part)."
        )


def check_environment() -> None:
    question = f"import sys; sys.exit(sys.version_info < {OLDEST_PYTHON!r})"
    try:
        broken = subprocess.run([str(PYTHON), "-c", question], capture_output=True).returncode
    except OSError:
        broken = True
    if broken:
        raise SetupError(f"the Python in {VENV} is broken or too old: delete that folder.")


def install(arguments: Sequence[str]) -> None:
    print("installing what is missing into .venv (the first time: a few GB)", flush=True)
    quiet = [] if sys.stdout.isatty() and not in_ci() else ["--quiet", "--progress-bar", "off"]
    pip = [str(PYTHON), "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]
    pip += ["--no-compile"]  # most of these packages are never imported
    with subprocess.Popen(
        [*pip, *quiet, *arguments],
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    ) as process:
        complaints = process.stderr.read() if process.stderr else ""
    if not process.returncode:
        return
    if any(sign in complaints for sign in NO_NETWORK_SIGNS):
        raise SetupError(
            "pip cannot reach its package index: connect this machine to the network "
            "(or name a mirror in PIP_INDEX_URL), then run the same command again."
        )
    print(complaints.strip(), file=sys.stderr)
    raise SetupError("pip could not install what is needed; its own words stand above.")


# --- running things in it -----------------------------------------------------------------------


def in_ci() -> bool:
    return os.environ.get("CI", "").lower() not in ("", "0", "false")


def environment() -> dict[str, str]:
    """The variables for every command: no hub downloads, ComfyUI's place, quiet in CI."""
    variables = dict(os.environ)
    variables["HF_HUB_OFFLINE"] = "1"
    variables.setdefault("TOKENIZERS_PARALLELISM", "false")
    comfyui = find_comfyui()
    if comfyui:
        variables["COMFYUI_PATH"] = str(comfyui)
    if in_ci():
        variables.pop("FORCE_COLOR", None)
        variables["NO_COLOR"] = "1"
    return variables


def run(
    arguments: Sequence[str], threads: int | None = None, settings: Mapping[str, str] | None = None
) -> int:
    """Run the environment's Python in the project's folder; returns the exit status.

    threads: of PyTorch's arithmetic; None leaves the choice to PyTorch.
    settings: environment variables of this run alone.
    """
    variables = {**environment(), **(settings or {})}
    if threads:
        variables.setdefault("OMP_NUM_THREADS", str(threads))
    command = [str(PYTHON), *arguments]
    return subprocess.run(command, cwd=ROOT, env=variables, stdin=subprocess.DEVNULL).returncode


# --- test -----------------------------------------------------------------------------------------


def stages(everything: bool, pytest_arguments: Sequence[str]) -> dict[str, list[str]]:
    """What `test` runs, in order. With arguments for pytest it is pytest alone."""
    markers = [] if everything else ["-m", "not long"]
    pytest = ["-m", "pytest", "-q", *markers]
    if pytest_arguments:
        return {"tests": [*pytest, *pytest_arguments]}
    apart = [f"--ignore=tests/{name}" for name in ("browser", "server", "card")]
    plain = ["-m", "pytest", "-q", "-m", "not long", *apart, *SIDE_BY_SIDE]
    return {
        "lint": ["-m", "ruff", "check", "."],
        "format": ["-m", "ruff", "format", "--check", "."],
        "types": ["-m", "basedpyright", "--pythonpath", str(PYTHON)],
        **({"plain": plain} if everything else {}),
        # PyTorch takes a new device only before its first backward pass: a process of its own.
        "card": [*pytest, "tests/card"],
        "tests": [
            *pytest,
            "--ignore",
            "tests/card",
            *SIDE_BY_SIDE,
        ],  # last, so that their own count closes the log
    }


def timed(name: str, action: Callable[[], int]) -> tuple[int, str]:
    """Run one stage; returns its exit status and its line of the summary."""
    print(f"== {name}", flush=True)
    start = time.monotonic()
    status = action()
    line = f"   {name:<8}{'FAILED' if status else 'ok':<8}{time.monotonic() - start:7.1f} s"
    return status, line


def set_up_for_tests() -> int:
    prepare("test")
    print(f"ComfyUI: {find_comfyui() or 'not found, so its tests are left out'}", flush=True)
    return 0


def test(everything: bool, pytest_arguments: Sequence[str]) -> int:
    start = time.monotonic()
    _, line = timed("set-up", set_up_for_tests)
    lines, failed = [line], []
    for name, arguments in stages(everything, pytest_arguments).items():
        # The tests' networks are so small that threads would mostly wait for each other.
        settings = PLAIN_ARITHMETIC if name == "plain" else None
        status, line = timed(name, partial(run, arguments, threads=1, settings=settings))
        lines.append(line)
        if status:
            failed.append(name)
    print("\n".join(["", *lines]))
    verdict = f"FAILED ({', '.join(failed)})" if failed else "all good"
    print(f"dev.py test: {verdict} after {time.monotonic() - start:.0f} s", flush=True)
    return 1 if failed else 0


# --- demo -----------------------------------------------------------------------------------------


def demo(prompt: str) -> int:
    """Draw with the embedded model: in ComfyUI, headless, where one is found, else by sd3_core.

    A ComfyUI that fails is told of and does not end the demo.
    """
    prepare("demo")
    comfyui = find_comfyui()
    status = None
    if comfyui:
        print(f"Drawing in ComfyUI ({comfyui}).", flush=True)
        script = ROOT / "tests" / "support" / "demo_in_comfyui.py"
        status = run([str(script), prompt, str(PICTURE), SEED])
        if status:
            print("That ComfyUI could not draw it; what it said stands above.", flush=True)
    if status != 0:
        print("Drawing without ComfyUI.", flush=True)
        command = ["-m", "sd3_core", "generate", prompt, "--seed", SEED]
        status = run([*command, "-o", str(PICTURE)])
    if status == 0:
        print(f"The picture: {PICTURE}", flush=True)
        run(["-m", "sd3_core", "check", str(PICTURE), prompt])
    return status


# --- counts ---------------------------------------------------------------------------------------


def counts() -> int:
    prepare("test")
    return run([str(ROOT / "tests" / "support" / "step_counts.py")])


# --- the command line -----------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a narrow code page must not end a command
            stream.reconfigure(errors="backslashreplace")
    parser = argparse.ArgumentParser(
        prog="dev.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="demo | test | counts")
    demo_parser = commands.add_parser("demo", help="make a picture")
    demo_parser.add_argument(
        "prompt", nargs="*", metavar="PROMPT", default=["two red circles left of a blue square"]
    )
    test_parser = commands.add_parser("test", help="lint, types and tests")
    test_parser.add_argument(
        "--all", action="store_true", help="also the tests marked long, and plainer arithmetic"
    )
    commands.add_parser("counts", help="count a step on a pretended card")
    known, rest = parser.parse_known_args(arguments)
    if rest and known.command != "test":
        parser.error(f"unknown arguments: {' '.join(rest)}")
    try:
        if known.command == "demo":
            return demo(" ".join(known.prompt))
        if known.command == "counts":
            return counts()
        return test(known.all, rest)
    except SetupError as error:
        print(f"dev.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
