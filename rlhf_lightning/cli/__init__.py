"""The command `rlhf`: one verb for each root config in `conf/`."""
