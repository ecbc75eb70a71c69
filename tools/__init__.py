"""Programs behind commands of the root scripts, and those that keep the documentation true."""
