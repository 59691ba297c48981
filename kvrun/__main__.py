"""python -m kvrun."""

from kvrun.cli import main

if __name__ == "__main__":
    main()
