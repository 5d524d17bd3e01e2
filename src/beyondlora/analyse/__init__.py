"""What an adapter does to a model on real data: spectra and effective ranks, dead units, subspaces, splines.

>>> result = analyse([Path("runs/shakespeare")], data="text.txt", out=Path("runs/analysis"))
>>> layers = profile(model, batches)          # any PEFT model in memory, any batches
"""

from .profiles import LayerProfile as LayerProfile
from .profiles import profile as profile
from .run import analyse as analyse
