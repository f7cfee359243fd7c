"""How the embedded model is made, from nothing: one stage after the other, by training's own loop.

samples.py   (seed, step, row) -> pictures and captions of the world
vae.py       the autoencoder; then its decoder once more, behind the frozen encoder
words.py     the tokenizers' files, from the captions' words
text.py      the encoders: two CLIPs against a picture tower, T5 by filling gaps
flow.py      the MMDiT, by rectified flow
pack.py      all of it as one file
"""
