"""`python -m garden_py` is the `garden` command."""

from garden_py.entry import main

if __name__ == "__main__":
    main()
