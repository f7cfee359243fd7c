"""How the embedded model is made, from nothing: one stage after the other, by training's own loop.

samples.py   (seed, step, row) -> pictures and captions of the world
basis.py     the latents: principal components of 8 x 8 pixels
vae.py       the autoencoder that draws from them and finds them
words.py     the tokenizers' files, from the captions' words
text.py      the encoders: two CLIPs against a picture tower, T5 by filling gaps
shelf.py     pictures and captions of the world, encoded once
flow.py      the MMDiT, by rectified flow on shelves
pack.py      all of it as one file
make.py      the stages as named runs, and their budgets
"""
