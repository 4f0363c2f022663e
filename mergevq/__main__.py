"""Run the command line as `python -m mergevq`."""

from mergevq.cli import main

if __name__ == "__main__":
    main()
