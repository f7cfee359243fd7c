"""The networks of Stable Diffusion 3, nothing else."""
