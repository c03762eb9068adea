"""``python -m turnwise``, which is how torchrun starts it."""

from turnwise.cli.main import main

if __name__ == "__main__":
    main()
