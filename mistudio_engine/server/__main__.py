"""`python -m mistudio_engine.server serve …`: how a client starts the engine."""

from mistudio_engine.server.cli import main

if __name__ == "__main__":
    main()
