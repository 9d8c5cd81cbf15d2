"""`python -m mftctl` is the mftctl command."""

from mftctl.cli.app import main

if __name__ == "__main__":
    main()
