"""Load tests: headless Locust against a running service, with a page server of their own. See load/README.md."""
