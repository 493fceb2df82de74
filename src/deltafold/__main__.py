"""`python -m deltafold`: the command line."""

from deltafold.cli import main

if __name__ == "__main__":
    main()
