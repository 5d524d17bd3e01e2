"""What works here, found out by doing it: probes of methods, layers, optimizers, the environment, and one recipe."""

from .environment import describe_environment as describe_environment
from .optimizers import probe_optimizers as probe_optimizers
from .probes import probe_methods as probe_methods
from .report import as_json as as_json
from .report import as_markdown as as_markdown
from .trial import try_recipe as try_recipe
