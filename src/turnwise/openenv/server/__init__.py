"""Serve environments over OpenEnv's protocol: `app.create_app`, `turnwise env serve`."""
