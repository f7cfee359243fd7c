"""Many prompts at once are drawn as `generate` draws one."""

import pytest
import torch
from sd3_pack.sd3_core.embedded.drawing import Painter
from sd3_pack.sd3_core.generate import generate
from sd3_pack.sd3_core.pictures import to_uint8
from sd3_pack.sd3_core.settings import Files, Settings
from tiny import write_tiny_lora, write_tiny_model

QUICK = Settings("a red circle", seed=7, steps=3, cfg=3.0, sampler="euler", device="cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_a_painter_draws_with_the_files_loras(checkpoint, strength):
    lora = write_tiny_lora(checkpoint.with_name("style.safetensors"))
    files = Files(checkpoint=checkpoint, loras=((lora, strength),) if strength else ())
    drawn = to_uint8(Painter(files, QUICK)([QUICK.prompt], QUICK.seed))
    assert torch.equal(drawn, torch.as_tensor(generate(files, QUICK).pixels))
    if strength:
        plain = Painter(Files(checkpoint=checkpoint), QUICK)([QUICK.prompt], QUICK.seed)
        assert not torch.equal(drawn, to_uint8(plain))
