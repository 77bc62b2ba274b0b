"""Where architectures meet devices: estimates, and verified measurements of a config on a target."""
