"""`python -m beyondlora`, also under `accelerate launch -m beyondlora`."""

from .cli import main

if __name__ == "__main__":  # a worker process of the demo imports this file too
    main()
