"""jkv-compile."""
