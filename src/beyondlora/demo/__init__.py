"""The embedded default: a small pretrained model (base/), a recipe (recipe.yaml), and the comparison that uses them.

>>> from beyondlora.demo.run import demo
>>> demo(Path("runs/demo"), progress=Progress())
"""
