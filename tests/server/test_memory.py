"""A hundred prompts, some of them interrupted, leave the server's memory where it was."""

import json

import pytest
from api_workflows import text_to_image
from comfy_server import DONE

WARM, PROMPTS = 20, 100
STOPPED = 5  # every fifth prompt is interrupted
GROWTH = 32 * 2**20  # bytes allowed over the hundred; measured on Linux: 4 MiB up and down


@pytest.mark.long
def test_a_hundred_prompts_with_interrupts_leave_memory_flat(server):
    listener = server.listen()
    readings = []
    for number in range(WARM + PROMPTS):
        stop = number % STOPPED == STOPPED - 1
        size = 256 if number % 2 else 128
        workflow = text_to_image(
            "tiny.safetensors",
            f"{number} red circles",
            steps=200 if stop else 4,
            seed=1000 + number,
            pixels=size,
        )
        prompt = server.queue(workflow, listener.client_id, "latent2rgb")
        if stop:
            while listener.until("progress", prompt).data["value"] < 2:
                pass
            server.interrupt(prompt)
        ended = listener.until(DONE, prompt).type
        assert ended == ("execution_interrupted" if stop else "execution_success")
        readings.append(server.memory())
    listener.close()
    growth = readings[-1] - max(readings[WARM - 5 : WARM])
    mib = [round(reading / 2**20) for reading in readings[WARM - 1 :: 10]]
    print(f"resident MiB after {WARM} prompts and every 10 more: {json.dumps(mib)}")  # noqa: T201
    assert growth < GROWTH, mib
