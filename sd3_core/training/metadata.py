"""What a product tells about itself, in the names that other programs know, and in ours."""

import hashlib
import json
import time
from collections.abc import Sequence

from ..plain_text import as_json
from .cache import Cache
from .config import TrainConfig, told_settings
from .stages import fingerprint_of
from .subject import Subject, small_model

ARCHITECTURES = {
    "sd3_medium": "stable-diffusion-v3-medium",
    "sd3.5_medium": "stable-diffusion-v3.5-medium",
    "sd3.5_medium_turbo": "stable-diffusion-v3.5-medium",
    "sd3.5_large": "stable-diffusion-v3.5-large",
    "sd3.5_large_turbo": "stable-diffusion-v3.5-large-turbo",
}


def metadata(
    config: TrainConfig, subject: Subject, cache: Cache, step: int, changes: Sequence[str] = ()
) -> dict[str, str]:
    """What a product tells about itself, in the names that other programs know, and ours.

    changes: what distinguishes the frozen network from its file.
    """
    settings = as_json(told_settings(config))
    clip_rows = cache.layout.length - _t5_rows(cache)
    shared = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": config.run_name,
        "modelspec.date": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "modelspec.resolution": f"{subject.resolution}x{subject.resolution}",
        "modelspec.architecture": ARCHITECTURES.get(subject.family, "stable-diffusion-v3"),
        "sd3_workbench.training": settings,
        "sd3_workbench.steps": str(step),
        "sd3_workbench.data": subject.dataset.digest,
        "sd3_workbench.pictures": str(len(subject.dataset.items)),
        "sd3_workbench.training_shift": str(subject.schedule.shift),
        "sd3_workbench.t5_length": str(cache.layout.length - clip_rows),
        "sd3_workbench.base": fingerprint_of(subject.parts["mmdit"])
        if "mmdit" in subject.parts
        else "none",
    }
    if not config.trains_lora:
        return {**shared, **small_model(subject)}
    if changes:
        shared["sd3_workbench.base_changes"] = json.dumps(list(changes))
    if config.method == "dpo":
        conventions = {"beta": config.dpo_beta, "reduction": "mean", "half": True}
        options = {"sft_weight": config.dpo_sft_weight, "loser_scale": config.dpo_loser_scale}
        shared["sd3_workbench.dpo"] = json.dumps({**conventions, **options})
    alpha = config.rank if config.lora_alpha is None else config.lora_alpha
    shared["modelspec.architecture"] += "/lora"
    return {
        **shared,
        "modelspec.implementation": "https://github.com/Stability-AI/sd3.5",
        "ss_network_module": "networks.lora_sd3",
        "ss_network_dim": str(config.rank),
        "ss_network_alpha": str(float(alpha)),
        "ss_network_args": json.dumps({"kinds": config.lora_kinds, "streams": config.lora_streams}),
        "ss_base_model_version": subject.family,
        "ss_sd_model_name": subject.parts["mmdit"].file.name,
        "ss_learning_rate": str(config.learning_rate),
        "ss_steps": str(step),
        "ss_seed": str(config.seed),
        "ss_num_train_images": str(subject.dataset.report.pictures - subject.dataset.report.prior),
        "ss_num_reg_images": str(subject.dataset.report.prior),
        "ss_training_shift": str(subject.schedule.shift),
        "ss_dataset_dirs": "{}",
        "ss_output_name": config.run_name,
        "ss_session_id": hashlib.sha256(settings.encode()).hexdigest()[:16],
    }


def _t5_rows(cache: Cache) -> int:
    span = cache.layout.spans.get("t5")
    return 0 if span is None else span.rows[1] - span.rows[0]
