"""What the command line offers beside compiling: inspect, verify, bench."""
