"""One echo tool each by what can be installed from PyPI, for `python -m load.peers`: the fastest documented way."""
