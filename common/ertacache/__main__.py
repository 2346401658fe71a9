"""`python -m ertacache`, and `accelerate launch -m ertacache`: the command line."""

from ertacache.app import main

if __name__ == "__main__":
    main()
