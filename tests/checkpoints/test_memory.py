"""What a large file costs in memory: the mapped file, and little beside it."""

import sys

import pytest
import torch
from sd3_pack.sd3_core.checkpoints.load import load_t5
from sd3_pack.sd3_core.models.t5 import T5Config, T5Encoder
from tiny import shapes_of, write_hollow

XXL = T5Config(
    d_model=4096,
    d_ff=10240,
    d_kv=64,
    num_heads=64,
    num_layers=24,
    vocab_size=32128,
    num_buckets=32,
)


def private_bytes() -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells private from mapped memory")
def test_t5_xxl_in_fp8_runs_in_five_gigabytes(tmp_path):
    path = write_hollow(tmp_path / "t5xxl_fp8.safetensors", shapes_of(T5Encoder, XXL), "F8_E4M3", 1)
    assert path.stat().st_size < 4.8e9
    before = private_bytes()
    network = load_t5(path, dtype=torch.bfloat16)
    assert private_bytes() - before < 0.1e9
    with torch.inference_mode():
        network(torch.ones(1, 77, dtype=torch.int64))
    assert private_bytes() - before < 0.3e9  # measured: 0.1 GB; a converted T5 takes 9.5 GB
