"""A miniature of InstructGPT for two CPU cores: data, base model, judge, and the recipes `rlhf demo` and `rlhf figure`."""
