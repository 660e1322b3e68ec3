"""The command line as ``python -m mipprune``, which torchrun starts too."""

from .cli import main

if __name__ == "__main__":
    main()
