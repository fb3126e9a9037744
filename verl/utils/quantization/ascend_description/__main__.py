"""`python -m verl.utils.quantization.ascend_description`: the same as `verl describe` without `--budget`."""

import sys

from verl.utils.quantization.ascend_description.command import main

sys.exit(main())
