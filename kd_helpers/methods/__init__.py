"""One module for each published method: its losses, its models and how it trains, all over `kd_helpers.loop.fit`."""
