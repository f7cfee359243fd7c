"""The paper in miniature: its claims, measured on the embedded model and on small trained arms.

budgets.py     how much is trained and drawn
world.py       what the arms see: single things of 64 px, and their captions, encoded once
arms.py        a small MMDiT under one of the choices that are compared
preference.py  an arm taught by the checker's preferences
autoencoder.py VAEs of 4, 8 and 16 channels
features.py    the fixed features behind FID, and SSIM
drawing.py     arms and checkpoints draw; how long their paths are
statistics.py  intervals, and the rule that decides a verdict
cells.py       what was measured, its key, and the ledger that keeps it
lab.py         makes what is not there yet, within the time there is
rows/          the claims, one module for each group
report.py      table, CSV, figures
run.py         `python -m sd3_core study`
"""
