"""`python -m app` is `agentcore-tools`."""

from app.cli import main

if __name__ == "__main__":
    main()
