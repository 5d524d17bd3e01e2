"""`python -m beyondlora`, also under `accelerate launch -m beyondlora`."""

from .cli import main

main()
