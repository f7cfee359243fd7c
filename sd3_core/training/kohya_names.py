"""What the settings of sd-scripts are called here, and why some have no place."""

from typing import Any

from ..errors import cut
from .config import TEXT_ENCODERS_STAY

# What is always so here, or belongs to a way of working that there is not: no word about these.
ALWAYS_SO = frozenset(
    (
        *("cache_latents", "cache_latents_to_disk", "cache_text_encoder_outputs", "save_state"),
        *("cache_text_encoder_outputs_to_disk", "save_state_on_train_end", "skip_cache_check"),
        *("sdpa", "xformers", "mem_eff_attn", "highvram", "lowvram", "vae_batch_size"),
        *("max_data_loader_n_workers", "persistent_data_loader_workers"),
        *("logging_dir", "log_with", "log_prefix", "console_log_level", "metadata_title"),
        *("cache_info", "config_file", "output_config"),
    )
)
# As ALWAYS_SO, but at these values only.
EXPECTED = {
    "network_module": ("networks.lora_sd3",),
    "network_train_unet_only": (True,),
    "enable_bucket": (True,),
    "save_model_as": ("safetensors",),
}
RENAMED = {
    "max_train_steps": "steps",
    "batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulation",
    "learning_rate": "learning_rate",
    "max_grad_norm": "clip",
    "network_dim": "rank",
    "network_alpha": "lora_alpha",
    "network_dropout": "lora_dropout",
    "seed": "seed",
    "output_dir": "output",
    "pretrained_model_name_or_path": "checkpoint",
    "vae": "vae",
    "clip_l": "clip_l",
    "clip_g": "clip_g",
    "t5xxl": "t5",
    "t5xxl_max_token_length": "t5_length",
    "bucket_reso_steps": "bucket_step",
    "save_every_n_steps": "export_every",
    "sample_every_n_steps": "sample_every",
    "gradient_checkpointing": "gradient_checkpointing",
    "training_shift": "shift",
    "caption_dropout_rate": "caption_dropout",
}
CHOICES = {
    "optimizer_type": (
        "optimizer",
        {
            "adamw": "adamw",
            "adamw8bit": "adamw_8bit",
            "adafactor": "adafactor",
            "prodigy": "prodigy",
        },
    ),
    "lr_scheduler": (
        "lr_schedule",
        {"constant": "constant", "constant_with_warmup": "constant", "cosine": "cosine"},
    ),
    "mixed_precision": ("dtype", {"bf16": "bf16", "no": "fp32"}),
    "save_precision": ("save_dtype", {"float": "fp32", "fp16": "fp16", "bf16": "bf16"}),
    "random_crop": ("crop", {"true": "random", "false": "centre"}),
    "alpha_mask": ("alpha", {"true": "mask", "false": "composite"}),
}
NOT_USED = {
    "max_train_epochs": "give steps; `train` tells how many epochs they are",
    "save_every_n_epochs": "give export_every, in steps",
    "sample_every_n_epochs": "give sample_every, in steps",
    "network_train_unet_only": TEXT_ENCODERS_STAY,
    "text_encoder_lr": TEXT_ENCODERS_STAY,
    "network_module": "a LoRA on attention, MLP and adaLN is taught",
    "enable_bucket": "every picture goes to a bucket of its aspect; widest = 1 makes all square",
    "save_model_as": "files are safetensors",
    "fp8_base": "give an fp8 file of the model; it is kept as it is stored",
    "blocks_to_swap": "blocks stay on the device; gradient_checkpointing saves most",
    "prior_loss_weight": "here prior_weight weighs how far the LoRA moves regularisation pictures",
    "train_data_dir": "a dataset_config names its own, with image_dir",
    "reg_data_dir": "a dataset_config names its own, with is_reg",
    "in_json": "captions are read beside the pictures, or from a metadata.jsonl",
    "enable_wildcard": "a line of several is drawn at random, as there; {a|b} is read as it stands",
    "flip_aug": "pictures are never mirrored",
    "mixed_precision": "fp16 overflows in training",
    "apply_t5_attn_mask": "SD3 was trained without masks",
    "apply_lg_attn_mask": "SD3 was trained without masks",
}


# What sd-scripts does when nothing is said, and we do not: our setting, and the value it has there.
DEFAULTS_THERE = {
    "steps": 1600,
    "learning_rate": 2e-6,
    "eps": 1e-8,
    "rank": 4,
    "warmup": 0,
    "widest": 1.0,  # enable_bucket is off
    "t5_length": 256,
    "caption_dropout": 0.0,
    "density": "uniform",
    "shift": 1.0,
    "loss_space": "x0",
    "dtype": "fp32",
}
# Which setting of theirs makes such a default untrue, where it is not the one of the same place.
INSTEAD = {"steps": "max_train_epochs", "widest": "enable_bucket"}


def is_off(name: str, value: Any) -> bool:
    """Whether a value asks for nothing."""
    return name not in EXPECTED and value in (False, 0, "", [])


def unused(label: str, name: str, value: Any) -> str:
    """The line about a setting that is not used, and why."""
    reason = NOT_USED.get(name)
    return f"{cut(label)} = {cut(value)}" + (f": {reason}" if reason else "")
