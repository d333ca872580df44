"""The probed GPT on stories: model, data, module, and the study made with it."""
