"""Stable Diffusion 3 and 3.5 in plain PyTorch.

generate      prompt -> picture; read this first        settings, verify   what was asked, and again
models        MMDiT, VAE, CLIP, T5                       text, checkpoints  words and files
schedule      rectified-flow time                       noise, samplers, guidance, conditioning
lora          low-rank changes                          training           LoRA and full training
presets       settings per family                       bench, embedded    measuring; a small world

Nothing is imported here, so that `import sd3_core` costs nothing.
"""
