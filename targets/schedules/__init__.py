"""How kernels are written for a CPU: one file a kind, sized by what the device is."""
