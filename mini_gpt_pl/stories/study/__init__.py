"""The report on runs of stories, beside the published values of the study."""
