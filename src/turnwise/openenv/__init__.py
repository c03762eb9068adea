"""OpenEnv's protocol, both ways: any environment as a server, any server as an environment.

Nothing here needs ``openenv-core``. `turnwise.openenv.served` says what a server hosts,
`turnwise.openenv.server` serves it, `turnwise.openenv.client` plays on servers, whoever wrote them.
"""
