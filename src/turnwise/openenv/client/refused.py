"""What to do where a server does not let a client in, in the words of all that connect."""

GIVE_TOKEN = "token= in Python, args.token in a recipe"
FORBIDDEN = (
    f"a wrong path, or a client that is not let in: correct the address, or give a token ({GIVE_TOKEN})"
)
"""For HTTP 403, with which uvicorn also answers a path that has no WebSocket."""
