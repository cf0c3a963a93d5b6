"""Starting and stopping. It imports nothing by itself: a rank needs much less than the process that starts it."""
