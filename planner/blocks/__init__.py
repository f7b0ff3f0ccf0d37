"""Plans inside a model's own blocks: which modules, captured apart, planned together."""
