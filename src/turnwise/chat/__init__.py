"""Messages to tokens, tokens to messages, and the bridge from one turn to the next."""
