"""The probed GPT on stories: model, data, module, and the study made with it.

To be read in this order: `data/` (stories, tokens, the probe hidden in them, batches); `objective`, `packing`, `gpt`,
`scoring`, `evaluation` and `module` (what is trained and logged); `trainer` and `reheating` (what is done with a
checkpoint); `switches` and `stored` (a finished run); `replay/` and `experiments/` (what is measured at its
checkpoints); `study/` (what a report says of all that, beside the paper).
"""
