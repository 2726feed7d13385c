"""Worker processes: the gateway, its affinity layer, the forwarder, and the command line."""
