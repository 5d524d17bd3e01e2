"""What a recipe asks of a model beside the loss: the options it would choose, the answers it writes, what it forgot.

>>> examination = Examination.of(recipe, processor, evaluation)    # before training: whatever is missing is said here
>>> examination = examination.begun_with(base)                     # what the base model knew
>>> scores = examination.measure(model)
"""

from .examination import Examination as Examination
from .examination import check_extras as check_extras
from .harness import Harness as Harness
