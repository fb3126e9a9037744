"""`python3 -m verl.cli`, for environments in which the script `verl` is not on the PATH."""

import sys

from verl.cli.entry import main

if __name__ == "__main__":
    sys.exit(main())
