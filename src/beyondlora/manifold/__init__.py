"""The geometry. torch only.

Importing it installs the Riemannian step: a `StiefelLinear` cannot exist in a process without it.
"""

from . import riemannian
from .linear import StiefelLinear as StiefelLinear
from .stiefel import distance_to_stiefel as distance_to_stiefel

riemannian.install()
