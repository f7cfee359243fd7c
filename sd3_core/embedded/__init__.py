"""The tiny model's world: what its pictures may show, how they are told, drawn, read and scored.

world.py     what there is: colours, shapes, sizes, places, relations; Scene and Request
scenes.py    counter -> Scene, with dice.py
render.py    Scenes -> pictures, with shapes.py and font.py
captions.py  Scene -> a short caption and a full sentence
requests.py  prompt -> Request, or the words it does not know
checker.py   pictures -> what can be seen in them, with components.py
verdict.py   what is seen against what was asked for
score.py     the mini GenEval on the prompts of evaluation.py
drawing.py   prompts -> pictures, by a model of this world
model.py     the file that comes with the pack, and what is said of a prompt it cannot draw
stages/      how that file is made
"""
