"""The maths. torch only, no PEFT: every adapter works beside a bare `nn.Linear`, as linear(x) + adapter(x)."""

from .adapter import Adapter as Adapter
from .aurora import AuroraAdapter as AuroraAdapter
from .aurora import StaticAuroraAdapter as StaticAuroraAdapter
from .cera import CeraAdapter as CeraAdapter
from .stella import StellaAdapter as StellaAdapter
