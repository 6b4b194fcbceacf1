"""`python -m or1_megatron` is `or1`."""

import sys

from or1_megatron.cli import main

if __name__ == "__main__":
    sys.exit(main())
