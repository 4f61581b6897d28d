"""The stages traces, train, evaluate and report as one run: its options, and the run itself."""
