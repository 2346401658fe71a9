"""`python -m ertacache`, and `accelerate launch -m ertacache`: the command line."""

from ertacache.cli import main

if __name__ == "__main__":
    main()
