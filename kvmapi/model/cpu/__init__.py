"""The model's CPU: Unicorn as the engine, everything privileged in our own code."""
