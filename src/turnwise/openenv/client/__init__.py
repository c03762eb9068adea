"""Play on OpenEnv servers, whoever wrote them: as environments of a run, or by hand."""
