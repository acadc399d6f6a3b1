"""Grids of training runs, and the tables made of them."""
