"""Nothing keeps what imports this file from launching. Usage: unguarded.py START_METHOD."""

import os
import sys

import fabricfn as ff

ff.launch(os.getpid, devices=2, accelerator="cpu", start_method=sys.argv[1])
