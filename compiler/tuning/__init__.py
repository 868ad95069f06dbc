"""The auto-tuner: what kernels cost on a machine, and which schedules are best there."""
