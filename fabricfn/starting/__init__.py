"""Starting and stopping: `init_runtime`, `runtime`, `shutdown`, `launch`."""

from fabricfn.starting.beginning import init_runtime as init_runtime, runtime as runtime
from fabricfn.starting.joining import shutdown as shutdown
from fabricfn.starting.launching import launch as launch
