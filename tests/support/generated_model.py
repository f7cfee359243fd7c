"""Write a tiny Stable Diffusion 3 with generated weights: generated_model.py FILE

For `dev.py demo`, which has no pytest to give the pack its name.
"""

import sys
import tempfile
import types
from pathlib import Path

PACK = Path(__file__).parent.parent.parent


def main(path: Path) -> None:
    sys.modules["sd3_pack"] = pack = types.ModuleType("sd3_pack")
    pack.__path__ = [str(PACK)]
    from tiny import write_tiny_checkpoint
    from tiny_tokenizers import write_tiny_tokenizers

    metadata = {"sd3_workbench.shift": "1.0", "sd3_workbench.native_pixels": str(256 * 256)}
    with tempfile.TemporaryDirectory() as folder:
        write_tiny_tokenizers(Path(folder))
        write_tiny_checkpoint(path, tokenizers=Path(folder), metadata=metadata)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
