"""Where checkpoints stand: folders on a disk, and URLs. How one is opened, appears by one step, and goes. No torch."""
