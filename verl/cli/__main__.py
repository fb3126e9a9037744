"""`python3 -m verl.cli`, where the script `verl` is not on the path."""

import sys

from verl.cli.entry import main

if __name__ == "__main__":
    sys.exit(main())
