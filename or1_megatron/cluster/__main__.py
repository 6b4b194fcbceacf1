"""`python -m or1_megatron.cluster`: waits until the Ray at RAY_ADDRESS is whole; see joining.py."""

import sys

from or1_megatron.cluster.joining import main

sys.exit(main())
