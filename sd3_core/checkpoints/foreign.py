"""Files that are something else: told from their first bytes, or from the names in them."""

import re
from collections.abc import Iterable

_PICKLE = (
    "it is a PyTorch pickle (.ckpt, .pt, .pth, .bin), whatever its name says. A pickle can run "
    "code when it is opened, so none is read here. Get the .safetensors version of the model."
)

# First bytes -> what the file is and what to do.
_MAGIC: tuple[tuple[tuple[bytes, ...], str], ...] = (
    ((b"PK\x03\x04", b"PK\x05\x06", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"), _PICKLE),
    (
        (b"GGUF",),
        "it is a GGUF file. Get the .safetensors version of the model, or use a GGUF loader.",
    ),
    (
        (b"version https://git-lfs", b"version https://hawser"),
        "it is a Git LFS pointer, a note about the model instead of the model. Run `git lfs pull` "
        "in its repository, or download the file itself.",
    ),
    (
        (b"<!doctype", b"<html", b"<?xml", b"<head", b"<body", b"<"),
        "it is a web page saved under the model's name. Download the file itself (the model may "
        "ask you to log in and accept its licence first).",
    ),
    (
        (b"access to model", b"entry not found", b"invalid username", b"repository not found"),
        "it is a website's refusal saved under the model's name. Log in, accept the model's "
        "licence, and download it again.",
    ),
    ((b"{", b"["), "it is JSON text. Name the .safetensors file itself."),
    ((b"\x89png", b"\xff\xd8\xff", b"riff", b"gif8"), "it is a picture or sound file."),
    ((b"\x89hdf",), "it is an HDF5 file. Get the .safetensors version of the model."),
    ((b"\x1f\x8b", b"7z\xbc\xaf", b"rar!"), "it is a packed archive. Unpack it first."),
    (
        (b"\0" * 16,),
        "it begins with zeros, like a download that was never finished. Download it again.",
    ),
)


def describe_bytes(beginning: bytes) -> str:
    """What a file that is no safetensors file seems to be, and what to do, as half a sentence."""
    text = beginning.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for starts, meaning in _MAGIC:
        if beginning.startswith(starts) or text.startswith(tuple(s.lower() for s in starts)):
            return meaning
    return "its first bytes are none that such a file begins with. Download it again."


_ELSE = "This program runs Stable Diffusion 3 and 3.5; ComfyUI's own loaders may know it."
_QUANTISED = "Get the file in bf16, fp16 or fp8 instead."

# Names in the file -> what it is and what to do. The first group holds beside an SD3 network too.
_BESIDE_SD3: tuple[tuple[str, str], ...] = (
    (
        r"\.lora_(up|down|mid|A|B)\b|\.hada_w[12]_[ab]$|\.lokr_w[12](_[ab])?$|\.dora_scale$"
        r"|^lora_(unet|te|transformer)|\.oft_(blocks|diag)|\.(diff|diff_b|set_weight)$",
        "it is a LoRA, a change to a model and no model. Load it with the LoRA loader, on top of "
        "an SD3 model.",
    ),
    (
        r"^(control_model|controlnet_blocks|controlnet_x_embedder|pos_embed_input)\."
        r"|input_hint_block\.|controlnet_cond_embedding\.",
        "it is a ControlNet, an addition to a model and no model. " + _ELSE,
    ),
    (r"^(image_proj|ip_adapter)\.", "it is an IP-Adapter, an addition to a model. " + _ELSE),
    (
        r"\.quant_state\.|\.absmax$|\.nested_absmax$",
        "its weights are quantised by bitsandbytes. " + _QUANTISED,
    ),
    (r"\.weight_scale_2$|\.weight_s_rel$", "its weights are quantised to 4 bits. " + _QUANTISED),
    (r"\.qweight$|\.qzeros$|\.wscales$", "its weights are quantised to 4 bits. " + _QUANTISED),
)
_INSTEAD_OF_SD3: tuple[tuple[str, str], ...] = (
    (r"^(emb_params|string_to_param|clip_[lg])$", "it is a textual-inversion embedding."),
    (
        r"^conditioner\.embedders\.|^model\.diffusion_model\.label_emb\.",
        "it is a Stable Diffusion XL checkpoint. " + _ELSE,
    ),
    (r"^cond_stage_model\.", "it is a Stable Diffusion 1.x or 2.x checkpoint. " + _ELSE),
    (
        r"(^|\.)input_blocks\.\d|^(unet\.)?(down_blocks|mid_block)\.",
        "it is a U-Net of Stable Diffusion 1.x, 2.x or XL. " + _ELSE,
    ),
    (
        r"(^|\.)double_blocks\.\d+\.img_|(^|\.)single_(transformer_)?blocks\.",
        "it is a Flux model or a relative of it. " + _ELSE,
    ),
    (r"(^|\.)(double_layers|joint_transformer_blocks)\.\d", "it is an AuraFlow model. " + _ELSE),
    (r"(^|\.)(adaln_single|t_block)\.", "it is a PixArt model or a relative of it. " + _ELSE),
    (r"(^|\.)transformer_blocks\.\d+\.img_mod\.", "it is a Qwen-Image model. " + _ELSE),
    (r"(^|\.)(noise|context)_refiner\.\d", "it is a Lumina or Z-Image model. " + _ELSE),
    (r"(^|\.)blocks\.\d+\.cross_attn\.", "it is a Wan model or a relative of it. " + _ELSE),
    (r"(^|\.)(clip_txt_mapper|effnet_mapper)\.", "it is a Stable Cascade model. " + _ELSE),
    (
        r"(^|\.)(post_)?quant_conv\.",
        "it is a VAE of Stable Diffusion 1.x, 2.x or XL (SD3's has 16 latent channels and no "
        "quant_conv). Give SD3's VAE: it is inside sd3_medium.safetensors and the SD3.5 files, and "
        "in the vae folder of their repositories.",
    ),
    (
        r"(^|\.)transformer\.resblocks\.",
        "it is a CLIP in OpenCLIP's layout. Get the clip_l.safetensors or clip_g.safetensors that "
        "comes with SD3.",
    ),
    (
        r"\.layer\.\d\.DenseReluDense\.wi\.weight$",
        "it is a T5 of version 1.0. SD3 takes T5 v1.1 XXL: t5xxl_fp16.safetensors.",
    ),
    (
        r"\.block\.1\.layer\.0\.SelfAttention\.relative_attention_bias",
        "it is a UMT5 encoder. SD3 takes T5 v1.1 XXL: t5xxl_fp16.safetensors.",
    ),
    (
        r"^(model\.)?(layers\.0\.self_attn|embed_tokens)\b",
        "it is a language model. SD3 takes CLIP-L, CLIP-G and T5 v1.1 XXL as text encoders.",
    ),
    (r"^(conv_first|body\.\d+|model\.\d+)\.", "it is an upscaling model."),
    (r"^(taesd_)?(en|de)coder\.\d+\.|^\d+\.(weight|conv\.)", "it is a TAESD preview VAE."),
)
_CLIP_VISION = "it is a CLIP vision encoder. SD3 takes the text encoders CLIP-L and CLIP-G."


def describe_names(names: Iterable[str]) -> str | None:
    """What a file with these tensors is, if it is a known kind of something else; see above."""
    text = "\n".join(names)
    if not text:
        return "it holds no tensors."
    has_mmdit = re.search(r"joint_blocks\.\d", text) is not None
    for pattern, meaning in _BESIDE_SD3 + (() if has_mmdit else _INSTEAD_OF_SD3):
        if re.search(pattern, text, re.MULTILINE):
            return meaning
    if re.search(r"^vision_model\.", text, re.MULTILINE) and "text_model." not in text:
        return _CLIP_VISION
    return None
