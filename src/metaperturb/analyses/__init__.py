"""Analyses take finished runs (`metaperturb.trained`) and know nothing of training: the paper's figures as numbers."""
