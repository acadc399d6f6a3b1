"""Looking at finished runs (`metaperturb.trained`): the figures of the paper as numbers. They know nothing of training."""
