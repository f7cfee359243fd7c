"""The process of one arm: requests as lines of JSON on stdin, answers as lines on stdout.

Started by run.py as `python -m sd3_core.bench.worker OPTIONS`.
"""

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .arm import Arm, Inputs, Work
from .arms import make_arm
from .cases import from_json
from .measure import Time, give_back_memory, memory, peak, timed, traffic

PACK = Path(__file__).resolve().parent.parent.parent


def main() -> None:
    options = json.loads(sys.argv[1])
    answers = private_stdout()
    # ComfyUI has a module `nodes` too; ours must not stand in its way.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != PACK]
    if options["threads"]:
        torch.set_num_threads(options["threads"])
    try:
        keep_within(options.get("memory_gb", 0.0), torch.device(options["device"]))
        worker = Worker(make_arm(options, torch.device(options["device"])), options["device"])
    except Exception as error:  # an implementation may refuse in any way of its own
        answer(answers, {"error": f"{type(error).__name__}: {error}"})
        return
    answer(answers, {"threads": torch.get_num_threads()})
    for line in sys.stdin:
        answer(answers, worker.reply(json.loads(line)))


def keep_within(gigabytes: float, device: torch.device) -> None:
    """This process takes no more of a GPU's memory; 0: as much as there is."""
    if gigabytes and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * 1e9 / total), device)


def private_stdout() -> TextIO:
    """The pipe to run.py for our answers alone; what libraries print goes to stderr."""
    pipe = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return pipe


def answer(pipe: TextIO, values: Mapping[str, Any]) -> None:
    pipe.write(json.dumps(values) + "\n")
    pipe.flush()


class Worker:
    """One arm, and the case it is prepared for."""

    def __init__(self, arm: Arm, device: str = "cpu"):
        self.arm = arm
        self.device = torch.device(device)
        self.work: Work | None = None
        self.inputs: Inputs = {}

    @torch.no_grad()
    def reply(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Do what is asked; what goes wrong is the answer, under "error"."""
        try:
            return getattr(self, request["do"])(**(request.get("with") or {}))
        except Exception as error:  # as above
            return {"error": f"{type(error).__name__}: {error}"}

    def prepare(self, case: dict[str, Any], file: str, inputs: str, output: str) -> dict[str, Any]:
        """Make ready for a case; its output is written for comparison."""
        self.work = None  # the last case's network leaves before the next one comes
        self.inputs = {k: v.to(self.device) for k, v in load_file(inputs).items()}
        self.work = self.arm.prepare(from_json(case), Path(file))
        results: list[Tensor] = []
        give_back_memory()
        loaded = memory()
        first = peak(lambda: results.append(self._result()), self.device)
        save_file({"output": results[0].float().cpu().contiguous()}, output)
        grown = None
        if first.private is not None and loaded.private is not None:
            grown = first.private - loaded.private
        return {"trained": getattr(self.work, "trained", None), "grown": grown}

    def run(self) -> dict[str, Any]:
        return {"time": asdict(timed(self._result, self.device))}

    def peak(self) -> dict[str, Any]:
        return {"memory": asdict(peak(self._result, self.device))}

    def traffic(self) -> dict[str, Any]:
        return {"traffic": traffic(self._result, self.device)}

    def release(self) -> dict[str, Any]:
        """The case's network leaves the device; the next arm may need all of it."""
        self.work = None
        self.arm.release()
        give_back_memory()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return {}

    def load(self, case: dict[str, Any], file: str) -> dict[str, Any]:
        """Load a file; then read every weight once, as a copy to another device would."""
        weights: dict[str, Tensor] = {}
        call = timed(
            lambda: weights.update(self.arm.load(from_json(case), Path(file))), self.device
        )
        held = memory()
        touch = timed(lambda: copy_each(weights), self.device)
        both = Time(call.cpu + touch.cpu, call.wall + touch.wall)
        return {
            "call": asdict(call),
            "touched": asdict(both),
            "memory": asdict(held),
            "sums": sums(weights),
        }

    def _result(self) -> Tensor:
        assert self.work is not None
        return self.work(self.inputs)


def copy_each(weights: Mapping[str, Tensor]) -> None:
    """Every weight into one buffer, as into the staging memory of a transfer."""
    largest = max(weight.numel() * weight.element_size() for weight in weights.values())
    buffer = torch.empty(largest, dtype=torch.uint8, device=next(iter(weights.values())).device)
    for weight in weights.values():
        part = buffer[: weight.numel() * weight.element_size()]
        part.view(weight.dtype).view(weight.shape).copy_(weight)


def sums(weights: Mapping[str, Tensor]) -> list[float]:
    """What stays the same however an implementation names, splits and turns its weights."""
    here = [weight.cpu() for weight in weights.values()]  # not every GPU has float64
    return [
        float(sum(weight.numel() for weight in here)),
        float(sum(weight.sum(dtype=torch.float64) for weight in here)),
        float(sum(weight.abs().sum(dtype=torch.float64) for weight in here)),
    ]


if __name__ == "__main__":
    main()
